// SPDX-License-Identifier: GPL-2.0
/*
 * Driver of the virtio test device.
 *
 * Request variant (default): every byte written to /dev/virtio_misc becomes one
 * request of its own, and write() returns once the device has answered it.
 * Timer variant (timer=1): every configuration change is answered, from a work
 * queue, with a counter of its own.
 *
 * A buffer belongs to the device from virtqueue_add_sgs() until it comes back
 * through virtqueue_get_buf() or, after a reset, virtqueue_detach_unused_buf().
 * A writer may leave earlier: because it was killed, or because the device broke.
 * So a buffer has two owners, the writer and the ring, and the last one frees it.
 *
 * The driver's state outlives the device while a file is open: @vt is counted,
 * and @gone, set under @lock before the queue goes, keeps late writers off it.
 */
#include <linux/completion.h>
#include <linux/fs.h>
#include <linux/kref.h>
#include <linux/list.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/scatterlist.h>
#include <linux/slab.h>
#include <linux/spinlock.h>
#include <linux/uaccess.h>
#include <linux/virtio.h>
#include <linux/virtio_config.h>
#include <linux/wait.h>
#include <linux/workqueue.h>

#include "virtio_test.h"

/* How often a waiting writer looks whether the device is still there. */
#define VIRTTEST_LOOK	HZ

static bool timer;
module_param(timer, bool, 0444);
MODULE_PARM_DESC(timer, "answer configuration changes instead of taking requests");

static bool quiet;
module_param(quiet, bool, 0644);
MODULE_PARM_DESC(quiet, "log no requests and answers");

struct virttest {
	struct kref ref;
	struct virtio_device *vdev;
	struct virtqueue *vq;		/* NULL: no request API */
	struct miscdevice misc;
	struct work_struct config_work;
	struct workqueue_struct *wq;
	wait_queue_head_t space;	/* descriptors came back */

	spinlock_t lock;		/* guards vq and all below */
	struct list_head in_flight;	/* buffers that somebody waits for */
	int gone;			/* negative errno: no more work */

	u32 num_pages;			/* only probe and config_work */
	u32 counter;			/* only config_work */
};

struct virttest_buf {
	struct kref ref;
	struct list_head node;		/* in virttest.in_flight, or empty */
	struct completion done;
	int status;
	bool counted;			/* counter, not request */
	/* What the device sees, apart from what only we see. */
	union {
		struct virttest_request request;
		__le32 counter;
	} out ____cacheline_aligned;
	struct virttest_response response ____cacheline_aligned;
};

static void virttest_free(struct kref *ref)
{
	kfree(container_of(ref, struct virttest, ref));
}

static void virttest_buf_free(struct kref *ref)
{
	kfree(container_of(ref, struct virttest_buf, ref));
}

static void virttest_buf_put(struct virttest_buf *buf)
{
	kref_put(&buf->ref, virttest_buf_free);
}

static struct virttest_buf *virttest_buf_alloc(void)
{
	struct virttest_buf *buf = kzalloc(sizeof(*buf), GFP_KERNEL);

	if (buf) {
		kref_init(&buf->ref);
		INIT_LIST_HEAD(&buf->node);
		init_completion(&buf->done);
	}
	return buf;
}

/* Tells the writer how it ended; later endings of the same buffer are ignored. */
static void virttest_finish(struct virttest_buf *buf, int status)
{
	if (list_empty(&buf->node))
		return;
	list_del_init(&buf->node);
	buf->status = status;
	complete(&buf->done);
}

/* Ends everything in flight for its writers. The ring keeps its buffers. */
static void virttest_fail_all(struct virttest *vt, int error)
{
	struct virttest_buf *buf, *next;
	unsigned int count = 0;

	lockdep_assert_held(&vt->lock);
	if (!vt->gone)
		vt->gone = error;
	list_for_each_entry_safe(buf, next, &vt->in_flight, node) {
		virttest_finish(buf, error);
		count++;
	}
	if (count)
		dev_warn(&vt->vdev->dev, "%u in flight fail with %d\n", count, error);
	wake_up_all(&vt->space);
}

/* True, and everything failed, once the device cannot answer any more. */
static bool virttest_is_gone(struct virttest *vt)
{
	unsigned long flags;
	bool gone;

	spin_lock_irqsave(&vt->lock, flags);
	if (!vt->gone && virtqueue_is_broken(vt->vq)) {
		dev_err(&vt->vdev->dev, "the queue is broken\n");
		virttest_fail_all(vt, -EIO);
	}
	gone = vt->gone;
	spin_unlock_irqrestore(&vt->lock, flags);
	return gone;
}

static void virttest_log_response(const struct virttest_response *response)
{
	pr_info("virtio test_request_done get ack\n");
	pr_info("virtio response ret is %d\n", (int)le32_to_cpu(response->ret));
	pr_info("virtio response arg1 is %d\n", (int)le32_to_cpu(response->arg1));
	pr_info("virtio response arg2 is %d\n", (int)le32_to_cpu(response->arg2));
}

static void virttest_reap(struct virttest *vt, struct virttest_buf *buf, u32 len)
{
	int status = 0;

	/* An answer to what has failed already: its writer was told, and only once. */
	if (list_empty(&buf->node)) {
		virttest_buf_put(buf);
		return;
	}
	if (buf->counted) {
		if (!quiet)
			pr_info("virttest get ack\n");
	} else if (len < sizeof(buf->response)) {
		dev_err(&vt->vdev->dev, "response of %u bytes, %zu expected\n", len,
			sizeof(buf->response));
		status = -EIO;
	} else if (!quiet) {
		virttest_log_response(&buf->response);
	}
	virttest_finish(buf, status);
	virttest_buf_put(buf);
}

/*
 * One interrupt may stand for many used buffers: take them all, and look once
 * more after callbacks are enabled again.
 */
static void virttest_done(struct virtqueue *vq)
{
	struct virttest *vt = vq->vdev->priv;
	struct virttest_buf *buf;
	unsigned long flags;
	u32 len;

	spin_lock_irqsave(&vt->lock, flags);
	do {
		virtqueue_disable_cb(vq);
		while ((buf = virtqueue_get_buf(vq, &len)))
			virttest_reap(vt, buf, len);
		if (virtqueue_is_broken(vq)) {
			if (!vt->gone)
				dev_err(&vt->vdev->dev, "the queue is broken\n");
			virttest_fail_all(vt, -EIO);
			break;
		}
	} while (!virtqueue_enable_cb(vq));
	wake_up_all(&vt->space);
	spin_unlock_irqrestore(&vt->lock, flags);
}

/* Gives @buf to the device; -ENOSPC while the queue is full. */
static int virttest_try_send(struct virttest *vt, struct virttest_buf *buf)
{
	struct scatterlist out, in, *sgs[] = { &out, &in };
	unsigned long flags;
	int ret;

	if (buf->counted)
		sg_init_one(&out, &buf->out.counter, sizeof(buf->out.counter));
	else
		sg_init_one(&out, &buf->out.request, sizeof(buf->out.request));
	sg_init_one(&in, &buf->response, sizeof(buf->response));

	spin_lock_irqsave(&vt->lock, flags);
	ret = vt->gone;
	if (!ret)
		ret = virtqueue_add_sgs(vt->vq, sgs, 1, buf->counted ? 0 : 1, buf,
					GFP_ATOMIC);
	if (!ret) {
		kref_get(&buf->ref);
		list_add_tail(&buf->node, &vt->in_flight);
	}
	/* A full queue is kicked too: the device may not have seen all of it. */
	if ((!ret || ret == -ENOSPC) && !virtqueue_kick(vt->vq)) {
		dev_err(&vt->vdev->dev, "the device cannot be notified\n");
		virttest_fail_all(vt, -EIO);
		if (ret == -ENOSPC)
			ret = -EIO;
	}
	spin_unlock_irqrestore(&vt->lock, flags);
	return ret;
}

static int virttest_send(struct virttest *vt, struct virttest_buf *buf)
{
	int ret;

	for (;;) {
		DEFINE_WAIT(wait);

		prepare_to_wait(&vt->space, &wait, buf->counted ? TASK_IDLE : TASK_KILLABLE);
		ret = virttest_try_send(vt, buf);
		if (ret == -ENOSPC && !buf->counted && fatal_signal_pending(current))
			ret = -EINTR;
		if (ret == -ENOSPC)
			schedule_timeout(VIRTTEST_LOOK);
		finish_wait(&vt->space, &wait);
		if (ret != -ENOSPC)
			return ret;
		virttest_is_gone(vt);
	}
}

static int virttest_wait(struct virttest *vt, struct virttest_buf *buf)
{
	long left;

	do {
		left = wait_for_completion_killable_timeout(&buf->done, VIRTTEST_LOOK);
		if (left < 0)
			return -EINTR;
	} while (!left && !virttest_is_gone(vt));
	/* Whoever declared the device gone has finished the buffer before. */
	return buf->status;
}

static ssize_t virttest_write(struct file *file, const char __user *data, size_t count,
			      loff_t *pos)
{
	struct virttest *vt = file->private_data;
	struct virttest_buf *buf;
	u8 number;
	int ret;

	if (count != sizeof(number))
		return -EINVAL;
	if (copy_from_user(&number, data, sizeof(number)))
		return -EFAULT;

	buf = virttest_buf_alloc();
	if (!buf)
		return -ENOMEM;
	buf->out.request.type = cpu_to_le32(number);
	buf->out.request.arg1 = cpu_to_le32((u8)(number + 1));
	buf->out.request.arg2 = cpu_to_le32((u8)(number + 2));
	buf->out.request.arg3 = cpu_to_le32((u8)(number + 3));
	strscpy(buf->out.request.arg4, "hello back end!", sizeof(buf->out.request.arg4));

	ret = virttest_send(vt, buf);
	if (!ret)
		ret = virttest_wait(vt, buf);
	virttest_buf_put(buf);
	return ret ?: (ssize_t)count;
}

static int virttest_open(struct inode *inode, struct file *file)
{
	/* misc_open() and misc_deregister() exclude each other: @vt is alive. */
	struct virttest *vt = container_of(file->private_data, struct virttest, misc);

	kref_get(&vt->ref);
	file->private_data = vt;
	return nonseekable_open(inode, file);
}

static int virttest_release(struct inode *inode, struct file *file)
{
	struct virttest *vt = file->private_data;

	kref_put(&vt->ref, virttest_free);
	return 0;
}

static const struct file_operations virttest_fops = {
	.owner = THIS_MODULE,
	.open = virttest_open,
	.release = virttest_release,
	.write = virttest_write,
};

/* Takes over what the device wishes, and says so. */
static void virttest_read_config(struct virttest *vt)
{
	u32 num_pages;

	virtio_cread_le(vt->vdev, struct virttest_config, num_pages, &num_pages);
	if (num_pages != vt->num_pages)
		virtio_cwrite_le(vt->vdev, struct virttest_config, actual, &num_pages);
	vt->num_pages = num_pages;
}

static void virttest_send_counter(struct virttest *vt)
{
	struct virttest_buf *buf = virttest_buf_alloc();

	if (!buf)
		return;
	buf->counted = true;
	buf->out.counter = cpu_to_le32(++vt->counter);
	virttest_send(vt, buf);
	virttest_buf_put(buf);
}

static void virttest_config_work(struct work_struct *work)
{
	struct virttest *vt = container_of(work, struct virttest, config_work);
	unsigned long flags;

	if (vt->vdev->config->get_status(vt->vdev) & VIRTIO_CONFIG_S_NEEDS_RESET) {
		dev_err(&vt->vdev->dev, "the device needs a reset\n");
		spin_lock_irqsave(&vt->lock, flags);
		virttest_fail_all(vt, -EIO);
		spin_unlock_irqrestore(&vt->lock, flags);
		return;
	}
	virttest_read_config(vt);
	if (timer) {
		if (!quiet)
			pr_info("virttest get config change\n");
		virttest_send_counter(vt);
	}
}

/* The core calls this only between the end of probe and the start of remove. */
static void virttest_changed(struct virtio_device *vdev)
{
	struct virttest *vt = vdev->priv;

	if (timer && !quiet)
		pr_info("virttest %s\n", __func__);
	queue_work(vt->wq, &vt->config_work);
}

static int virttest_probe(struct virtio_device *vdev)
{
	bool requests = !timer && virtio_has_feature(vdev, VIRTTEST_F_CAN_PRINT);
	struct virtqueue *vq;
	struct virttest *vt;
	int ret;

	vt = kzalloc(sizeof(*vt), GFP_KERNEL);
	if (!vt)
		return -ENOMEM;
	kref_init(&vt->ref);
	INIT_WORK(&vt->config_work, virttest_config_work);
	init_waitqueue_head(&vt->space);
	spin_lock_init(&vt->lock);
	INIT_LIST_HEAD(&vt->in_flight);
	vt->vdev = vdev;
	vdev->priv = vt;

	vt->wq = alloc_ordered_workqueue("virtio_test", 0);
	if (!vt->wq) {
		ret = -ENOMEM;
		goto put;
	}
	if (requests || timer) {
		vq = virtio_find_single_vq(vdev, virttest_done, "test");
		if (IS_ERR(vq)) {
			ret = PTR_ERR(vq);
			goto destroy;
		}
		vt->vq = vq;
	} else {
		dev_warn(&vdev->dev, "the device does not offer CAN_PRINT: no request API\n");
	}
	virttest_read_config(vt);
	virtio_device_ready(vdev);

	if (requests) {
		vt->misc.minor = VIRTTEST_MINOR;
		vt->misc.name = VIRTTEST_NAME;
		vt->misc.fops = &virttest_fops;
		vt->misc.parent = &vdev->dev;
		ret = misc_register(&vt->misc);
		if (ret) {
			dev_err(&vdev->dev, "cannot register /dev/" VIRTTEST_NAME ": %d\n", ret);
			goto reset;
		}
	}
	return 0;

reset:
	virtio_reset_device(vdev);
	vdev->config->del_vqs(vdev);
destroy:
	destroy_workqueue(vt->wq);
put:
	kref_put(&vt->ref, virttest_free);
	return ret;
}

static void virttest_remove(struct virtio_device *vdev)
{
	struct virttest *vt = vdev->priv;
	struct virttest_buf *buf, *next;
	LIST_HEAD(unused);

	if (vt->misc.fops)
		misc_deregister(&vt->misc);

	/* From here on nobody touches the queue but virttest_done(). */
	spin_lock_irq(&vt->lock);
	virttest_fail_all(vt, -ENODEV);
	spin_unlock_irq(&vt->lock);
	destroy_workqueue(vt->wq);

	/*
	 * A status of all ones says that nobody answers: the PCI function has
	 * gone, or what carries it has. Its reset would be waited for for ever.
	 */
	if (vdev->config->get_status(vdev) != 0xff)
		virtio_reset_device(vdev);
	if (vt->vq) {
		/*
		 * Not every transport waits in reset for its callbacks and its
		 * device; virtio_uml stops the device only in del_vqs().
		 */
		spin_lock_irq(&vt->lock);
		while ((buf = virtqueue_detach_unused_buf(vt->vq)))
			list_add_tail(&buf->node, &unused);
		spin_unlock_irq(&vt->lock);
		vdev->config->del_vqs(vdev);
		list_for_each_entry_safe(buf, next, &unused, node)
			virttest_buf_put(buf);
	}
	kref_put(&vt->ref, virttest_free);
}

static const unsigned int virttest_features[] = {
	VIRTTEST_F_CAN_PRINT,
};

static const struct virtio_device_id virttest_ids[] = {
	{ VIRTIO_ID_TEST, VIRTIO_DEV_ANY_ID },
	{ 0 },
};
MODULE_DEVICE_TABLE(virtio, virttest_ids);

static struct virtio_driver virttest_driver = {
	.driver.name = KBUILD_MODNAME,
	.driver.owner = THIS_MODULE,
	.id_table = virttest_ids,
	.feature_table = virttest_features,
	.feature_table_size = ARRAY_SIZE(virttest_features),
	.probe = virttest_probe,
	.remove = virttest_remove,
	.config_changed = virttest_changed,
};
module_virtio_driver(virttest_driver);

MODULE_DESCRIPTION("Driver of the virtio test device");
MODULE_LICENSE("GPL");
