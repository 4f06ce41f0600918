// SPDX-License-Identifier: GPL-2.0
/*
 * A driver that breaks rules: it binds a virtio PCI function itself and does, step
 * by step, what is written to /dev/virtio_attack.
 *
 * It knows nothing of virtqueues. It has one area of memory that the device can
 * reach, the function's registers, and counters of its interrupts; steps write and
 * read those and wait for values. What is an attack and what must come of it is
 * known by whoever makes the steps.
 *
 * However wrong the steps are, they hurt the device and not this guest: places are
 * checked, waits end, and the area is ours alone. (What a device is told to write
 * elsewhere is another matter.)
 */
#include <linux/delay.h>
#include <linux/interrupt.h>
#include <linux/io-64-nonatomic-lo-hi.h>
#include <linux/jiffies.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/pci.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/virtio_pci.h>

#include "virtio_attack.h"

#define AREA_ORDER	6
#define AREA_SIZE	(PAGE_SIZE << AREA_ORDER)
#define STEPS_MAX	8192
#define STRUCTURES	5
#define VECTORS		4
#define WAIT		(5 * HZ)

/* Its name before Linux 6.8. */
#ifndef PCI_IRQ_INTX
#define PCI_IRQ_INTX	PCI_IRQ_LEGACY
#endif

static bool line;
module_param(line, bool, 0444);
MODULE_PARM_DESC(line, "use the interrupt line instead of MSI-X");

struct attack {
	struct pci_dev *pdev;
	struct miscdevice misc;
	struct mutex lock;		/* one program at a time */
	void *area;
	void __iomem *bars[PCI_STD_NUM_BARS];
	struct {
		u8 bar;
		u32 offset;
	} structures[STRUCTURES];	/* by cfg_type; 0 is none */
	bool found[STRUCTURES];
	atomic_t came[VECTORS];
	int vectors;
	u64 *results;
	size_t count;
};

/* ---- registers ---- */

/* The function's structures, the first of each type, as its capabilities have them. */
static int attack_find(struct attack *at)
{
	struct pci_dev *pdev = at->pdev;
	int pos;

	for (pos = pci_find_capability(pdev, PCI_CAP_ID_VNDR); pos;
	     pos = pci_find_next_capability(pdev, pos, PCI_CAP_ID_VNDR)) {
		u8 type, bar;
		u32 offset;

		pci_read_config_byte(pdev, pos + offsetof(struct virtio_pci_cap, cfg_type), &type);
		pci_read_config_byte(pdev, pos + offsetof(struct virtio_pci_cap, bar), &bar);
		pci_read_config_dword(pdev, pos + offsetof(struct virtio_pci_cap, offset), &offset);
		if (type >= STRUCTURES || at->found[type] || bar >= PCI_STD_NUM_BARS)
			continue;
		at->found[type] = true;
		at->structures[type].bar = bar;
		at->structures[type].offset = offset;
	}
	return at->found[VIRTIO_PCI_CAP_COMMON_CFG] && at->found[VIRTIO_PCI_CAP_ISR_CFG] ? 0 : -ENODEV;
}

/* The address of a register in memory; NULL when it lies outside of the BAR. */
static void __iomem *attack_register(struct attack *at, const struct attack_step *step)
{
	u64 offset = step->offset;
	unsigned int bar;

	if (step->place < STRUCTURES && at->found[step->place]) {
		bar = at->structures[step->place].bar;
		offset += at->structures[step->place].offset;
	} else {
		bar = step->place - ATTACK_PLACE_BAR;
	}
	if (bar >= PCI_STD_NUM_BARS || !at->bars[bar] ||
	    offset + step->width > pci_resource_len(at->pdev, bar))
		return NULL;
	return at->bars[bar] + offset;
}

static int attack_read_config(struct attack *at, const struct attack_step *step, u64 *value)
{
	u32 dword = 0;
	u16 word = 0;
	u8 byte = 0;
	int ret;

	switch (step->width) {
	case 1:
		ret = pci_read_config_byte(at->pdev, step->offset, &byte);
		*value = byte;
		return ret;
	case 2:
		ret = pci_read_config_word(at->pdev, step->offset, &word);
		*value = word;
		return ret;
	case 4:
		ret = pci_read_config_dword(at->pdev, step->offset, &dword);
		*value = dword;
		return ret;
	}
	return -EINVAL;
}

static int attack_in(struct attack *at, const struct attack_step *step, u64 *value)
{
	void __iomem *from;

	if (step->place == ATTACK_PLACE_CONFIG)
		return attack_read_config(at, step, value);
	from = attack_register(at, step);
	if (!from)
		return -EFAULT;
	switch (step->width) {
	case 1:
		*value = readb(from);
		return 0;
	case 2:
		*value = readw(from);
		return 0;
	case 4:
		*value = readl(from);
		return 0;
	case 8:
		*value = readq(from);
		return 0;
	}
	return -EINVAL;
}

static int attack_out(struct attack *at, const struct attack_step *step, u64 value)
{
	void __iomem *to;

	if (step->place == ATTACK_PLACE_CONFIG) {
		switch (step->width) {
		case 1:
			return pci_write_config_byte(at->pdev, step->offset, value);
		case 2:
			return pci_write_config_word(at->pdev, step->offset, value);
		case 4:
			return pci_write_config_dword(at->pdev, step->offset, value);
		}
		return -EINVAL;
	}
	to = attack_register(at, step);
	if (!to)
		return -EFAULT;
	switch (step->width) {
	case 1:
		writeb(value, to);
		return 0;
	case 2:
		writew(value, to);
		return 0;
	case 4:
		writel(value, to);
		return 0;
	case 8:
		writeq(value, to);
		return 0;
	}
	return -EINVAL;
}

/* ---- memory ---- */

static bool attack_inside(const struct attack_step *step, u64 length)
{
	return step->offset <= AREA_SIZE && length <= AREA_SIZE - step->offset;
}

static int attack_get(struct attack *at, const struct attack_step *step, u64 *value)
{
	if (step->width > sizeof(*value) || !attack_inside(step, step->width))
		return -EFAULT;
	*value = 0;
	/* The device writes here; the oldest byte is little endian as the guest is. */
	barrier();
	memcpy(value, at->area + step->offset, step->width);
	return 0;
}

static int attack_put(struct attack *at, const struct attack_step *step, u64 value)
{
	if (step->width > sizeof(value) || !attack_inside(step, step->width))
		return -EFAULT;
	/* Whoever polls a later field finds the earlier ones written. */
	smp_wmb();
	memcpy(at->area + step->offset, &value, step->width);
	return 0;
}

/* ---- steps ---- */

static int attack_base(struct attack *at, const struct attack_step *step, u64 *value)
{
	unsigned int bar = step->base - ATTACK_BASE_BAR;

	*value = step->value;
	if (!step->base)
		return 0;
	if (step->base == ATTACK_BASE_AREA)
		*value += virt_to_phys(at->area);
	else if (step->base == ATTACK_BASE_END)
		*value += virt_to_phys(high_memory - 1) + 1;
	else if (bar < PCI_STD_NUM_BARS)
		*value += pci_bus_address(at->pdev, bar);
	else
		return -EINVAL;
	return 0;
}

static int attack_look(struct attack *at, const struct attack_step *step, u64 *value)
{
	int i;

	switch (step->kind) {
	case ATTACK_WAIT_AREA:
		return attack_get(at, step, value);
	case ATTACK_WAIT_REGISTER:
		return attack_in(at, step, value);
	}
	*value = 0;
	for (i = 0; i < VECTORS; i++)
		if (step->place == i || step->place == ATTACK_ANY_VECTOR)
			*value += atomic_read(&at->came[i]);
	return 0;
}

/* Waits for what the step wants to see, but not for ever; what was seen last. */
static int attack_wait(struct attack *at, const struct attack_step *step, u64 wanted, u64 *value)
{
	unsigned long end = jiffies + WAIT;
	unsigned int rounds = 0;
	bool late;
	int ret;

	do {
		late = time_after(jiffies, end);
		ret = attack_look(at, step, value);
		if (ret)
			return ret;
		if (step->kind == ATTACK_INTERRUPTS ? *value >= wanted : (*value & step->mask) == wanted)
			return 0;
		if (signal_pending(current))
			return -EINTR;
		if (++rounds > 100)
			usleep_range(50, 200);
		cond_resched();
	} while (!late);
	return 0;
}

static int attack_step(struct attack *at, const struct attack_step *step)
{
	u64 value, found = 0;
	int ret, i;

	ret = attack_base(at, step, &value);
	if (ret)
		return ret;
	switch (step->kind) {
	case ATTACK_PUT:
		return attack_put(at, step, value);
	case ATTACK_FILL:
		if (!attack_inside(step, value))
			return -EFAULT;
		memset(at->area + step->offset, step->place, value);
		return 0;
	case ATTACK_OUT:
		/* The device finds in memory what was put there before. */
		wmb();
		return attack_out(at, step, value);
	case ATTACK_FORGET:
		for (i = 0; i < VECTORS; i++)
			atomic_set(&at->came[i], 0);
		return 0;
	case ATTACK_GET:
		ret = attack_get(at, step, &found);
		break;
	case ATTACK_IN:
		ret = attack_in(at, step, &found);
		break;
	case ATTACK_WAIT_AREA:
	case ATTACK_WAIT_REGISTER:
	case ATTACK_INTERRUPTS:
		ret = attack_wait(at, step, value, &found);
		break;
	case ATTACK_RESET_FUNCTION:
		found = abs(pci_reset_function(at->pdev));
		break;
	case ATTACK_TELL:
		found = value;
		break;
	default:
		return -EINVAL;
	}
	if (!ret)
		at->results[at->count++] = found;
	return ret;
}

/* ---- the file ---- */

static struct attack *attack_of(struct file *file)
{
	return container_of(file->private_data, struct attack, misc);
}

static ssize_t attack_write(struct file *file, const char __user *from, size_t length, loff_t *pos)
{
	struct attack *at = attack_of(file);
	size_t count = length / sizeof(struct attack_step), i;
	struct attack_step *steps;
	int ret = 0;

	if (!count || count > STEPS_MAX || length % sizeof(*steps))
		return -EINVAL;
	steps = vmemdup_user(from, length);
	if (IS_ERR(steps))
		return PTR_ERR(steps);
	mutex_lock(&at->lock);
	at->count = 0;
	for (i = 0; i < count && !ret; i++)
		ret = attack_step(at, &steps[i]);
	if (ret)
		dev_err(&at->pdev->dev, "step %zu, of kind %u: %d\n", i - 1, steps[i - 1].kind, ret);
	mutex_unlock(&at->lock);
	kvfree(steps);
	return ret ? ret : length;
}

static ssize_t attack_read(struct file *file, char __user *to, size_t length, loff_t *pos)
{
	struct attack *at = attack_of(file);
	loff_t from = 0;
	ssize_t ret;

	mutex_lock(&at->lock);
	ret = simple_read_from_buffer(to, length, &from, at->results, at->count * sizeof(*at->results));
	mutex_unlock(&at->lock);
	return ret;
}

static const struct file_operations attack_fops = {
	.owner = THIS_MODULE,
	.write = attack_write,
	.read = attack_read,
};

/* ---- the function ---- */

static irqreturn_t attack_message(int irq, void *data)
{
	struct attack *at = data;
	int vector;

	for (vector = 0; vector < at->vectors; vector++)
		if (pci_irq_vector(at->pdev, vector) == irq)
			atomic_inc(&at->came[vector]);
	return IRQ_HANDLED;
}

/* The line counts as two vectors: 0 for the configuration, 1 for the queues. */
static irqreturn_t attack_line(int irq, void *data)
{
	const struct attack_step step = { .place = VIRTIO_PCI_CAP_ISR_CFG, .width = 1 };
	struct attack *at = data;
	u64 isr;

	if (attack_in(at, &step, &isr) || !isr || isr == 0xff)
		return IRQ_NONE;
	if (isr & VIRTIO_PCI_ISR_CONFIG)
		atomic_inc(&at->came[0]);
	if (isr & 1)
		atomic_inc(&at->came[1]);
	return IRQ_HANDLED;
}

static int attack_interrupts(struct attack *at)
{
	int i, ret;

	at->vectors = pci_alloc_irq_vectors(at->pdev, 1, line ? 1 : VECTORS, line ? PCI_IRQ_INTX : PCI_IRQ_MSIX);
	if (at->vectors < 0)
		return at->vectors;
	for (i = 0; i < at->vectors; i++) {
		ret = request_irq(pci_irq_vector(at->pdev, i), line ? attack_line : attack_message,
				  line ? IRQF_SHARED : 0, KBUILD_MODNAME, at);
		if (ret) {
			while (i--)
				free_irq(pci_irq_vector(at->pdev, i), at);
			pci_free_irq_vectors(at->pdev);
			return ret;
		}
	}
	return 0;
}

static void attack_no_interrupts(struct attack *at)
{
	int i;

	for (i = 0; i < at->vectors; i++)
		free_irq(pci_irq_vector(at->pdev, i), at);
	pci_free_irq_vectors(at->pdev);
}

static void attack_free(struct attack *at)
{
	int bar;

	for (bar = 0; bar < PCI_STD_NUM_BARS; bar++)
		if (at->bars[bar])
			pci_iounmap(at->pdev, at->bars[bar]);
	free_pages((unsigned long)at->area, AREA_ORDER);
	kvfree(at->results);
	kfree(at);
}

static int attack_probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	struct attack *at;
	int bar, ret;

	at = kzalloc(sizeof(*at), GFP_KERNEL);
	if (!at)
		return -ENOMEM;
	at->pdev = pdev;
	mutex_init(&at->lock);
	at->results = kvcalloc(STEPS_MAX, sizeof(*at->results), GFP_KERNEL);
	at->area = (void *)__get_free_pages(GFP_KERNEL | __GFP_ZERO, AREA_ORDER);
	ret = at->results && at->area ? pci_enable_device(pdev) : -ENOMEM;
	if (ret)
		goto free;
	for (bar = 0; bar < PCI_STD_NUM_BARS; bar++)
		if (pci_resource_flags(pdev, bar) & IORESOURCE_MEM)
			at->bars[bar] = pci_iomap(pdev, bar, 0);
	pci_set_master(pdev);
	ret = attack_find(at);
	if (ret)
		goto disable;
	ret = attack_interrupts(at);
	if (ret)
		goto disable;
	at->misc.minor = MISC_DYNAMIC_MINOR;
	at->misc.name = KBUILD_MODNAME;
	at->misc.fops = &attack_fops;
	at->misc.parent = &pdev->dev;
	ret = misc_register(&at->misc);
	if (ret)
		goto interrupts;
	pci_set_drvdata(pdev, at);
	return 0;

interrupts:
	attack_no_interrupts(at);
disable:
	pci_clear_master(pdev);
	pci_disable_device(pdev);
free:
	attack_free(at);
	return ret;
}

static void attack_remove(struct pci_dev *pdev)
{
	struct attack *at = pci_get_drvdata(pdev);

	misc_deregister(&at->misc);
	attack_no_interrupts(at);
	pci_clear_master(pdev);
	pci_disable_device(pdev);
	attack_free(at);
}

static const struct pci_device_id attack_ids[] = {
	{ PCI_DEVICE(PCI_VENDOR_ID_REDHAT_QUMRANET, PCI_ANY_ID) },
	{ 0 },
};
MODULE_DEVICE_TABLE(pci, attack_ids);

static struct pci_driver attack_driver = {
	.name = KBUILD_MODNAME,
	.id_table = attack_ids,
	.probe = attack_probe,
	.remove = attack_remove,
};
module_pci_driver(attack_driver);

MODULE_DESCRIPTION("A driver that breaks rules, for testing virtio devices");
MODULE_LICENSE("GPL");
