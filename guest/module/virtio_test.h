/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The interface of the virtio test device: what driver and device agree on.
 *
 * Queue 0 carries, as the device was made:
 *  - requests: one readable struct virttest_request, then one writable
 *    struct virttest_response (only with feature VIRTTEST_F_CAN_PRINT);
 *  - counters: one readable __le32 for every configuration change.
 */
#ifndef _VIRTIO_TEST_H
#define _VIRTIO_TEST_H

#include <linux/types.h>

#define VIRTIO_ID_TEST		45
#define VIRTTEST_MINOR		144
#define VIRTTEST_NAME		"virtio_misc"

/* The device answers requests. */
#define VIRTTEST_F_CAN_PRINT	0

struct virttest_config {
	/* The device's wish; the driver answers it in @actual. */
	__le32 num_pages;
	__le32 actual;
	__le32 event;
};

struct virttest_request {
	__le32 type;
	__le32 arg1;
	__le32 arg2;
	__le32 arg3;
	char arg4[32];
};

struct virttest_response {
	__le32 ret;
	__le32 arg1;
	__le32 arg2;
};

#endif /* _VIRTIO_TEST_H */
