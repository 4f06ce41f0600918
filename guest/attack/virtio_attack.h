/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What is written to /dev/virtio_attack: steps of 24 bytes, in the byte order of
 * the guest. Each step of a kind marked "result" adds 8 bytes to what is read.
 *
 * tests/kernel/attack/program.py makes them.
 */
#ifndef VIRTIO_ATTACK_H
#define VIRTIO_ATTACK_H

#include <linux/types.h>

enum {
	ATTACK_PUT = 1,		/* area[offset] = value, width bytes of it */
	ATTACK_GET,		/* result: area[offset] */
	ATTACK_FILL,		/* value bytes of the area from offset on become `place` */
	ATTACK_OUT,		/* register at (place, offset) = value */
	ATTACK_IN,		/* result: that register */
	ATTACK_WAIT_AREA,	/* until (area[offset] & mask) == value; result: the last one read */
	ATTACK_WAIT_REGISTER,	/* the same for a register */
	ATTACK_INTERRUPTS,	/* until vector `place` came `value` times; result: how often it came */
	ATTACK_FORGET,		/* no vector came */
	ATTACK_RESET_FUNCTION,	/* result: 0 or an errno */
	ATTACK_TELL,		/* result: value */
};

/* Where a register lies; 1 to 4 are the structures of VIRTIO 1.4, 4.1.4 by their cfg_type. */
#define ATTACK_PLACE_BAR	0x10	/* + its number */
#define ATTACK_PLACE_CONFIG	0x20	/* configuration space */

/* All vectors together. */
#define ATTACK_ANY_VECTOR	0xff

/* What is added to the value. */
#define ATTACK_BASE_AREA	1
#define ATTACK_BASE_END		2	/* the end of memory */
#define ATTACK_BASE_BAR		0x10	/* + its number: its bus address */

struct attack_step {
	__u8 kind;
	__u8 width;		/* 1, 2, 4 or 8 */
	__u8 place;
	__u8 base;
	__u32 offset;
	__u64 value;
	__u64 mask;
};

#endif
