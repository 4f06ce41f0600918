// SPDX-License-Identifier: GPL-2.0
/*
 * reads DEVICE COUNT DEPTH SEED: COUNT reads of 4 KiB at random places of a disk, DEPTH of them in flight, past the
 * kernel's cache. Each sector must begin with its number. Ends with 0 and "COUNT reads in NANOSECONDS ns, SUM", which is
 * that of the numbers of the sectors read first, else with 1 and one message.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/fs.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define SECTOR 512
#define BLOCK 4096
#define DEEPEST 64

static unsigned char blocks[DEEPEST][BLOCK] __attribute__((aligned(BLOCK)));
static struct iocb asked[DEEPEST];

static int failed(const char *what)
{
	printf("ERROR:%s: %s\n", what, strerror(errno));
	return 1;
}

/* Marsaglia's xorshift64: the same places for the same seed. */
static uint64_t any(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

static int ask(aio_context_t context, int fd, int which, uint64_t block)
{
	struct iocb *one = &asked[which];

	*one = (struct iocb){
		.aio_data = which,
		.aio_lio_opcode = IOCB_CMD_PREAD,
		.aio_fildes = fd,
		.aio_buf = (uintptr_t)blocks[which],
		.aio_nbytes = BLOCK,
		.aio_offset = block * BLOCK,
	};
	return syscall(SYS_io_submit, context, 1, &one) == 1 ? 0 : -1;
}

/* Whether the answer has the sectors that were asked for. */
static int right(const struct io_event *event)
{
	uint64_t first = asked[event->data].aio_offset / SECTOR;

	if (event->res != BLOCK)
		return 0;
	for (uint64_t i = 0; i < BLOCK / SECTOR; i++) {
		uint64_t number;

		memcpy(&number, blocks[event->data] + i * SECTOR, sizeof(number));
		if (number != first + i)
			return 0;
	}
	return 1;
}

static int run(int fd, long count, int depth, uint64_t size, uint64_t seed)
{
	aio_context_t context = 0;
	struct io_event events[DEEPEST];
	struct timespec begin, end;
	uint64_t sum = 0;
	long sent = 0, done = 0;

	if (syscall(SYS_io_setup, depth, &context))
		return failed("io_setup");
	clock_gettime(CLOCK_MONOTONIC, &begin);
	for (; sent < count && sent < depth; sent++)
		if (ask(context, fd, sent, any(&seed) % size))
			return failed("io_submit");
	while (done < count) {
		long came = syscall(SYS_io_getevents, context, 1, depth, events, NULL);

		if (came < 1)
			return failed("io_getevents");
		for (long i = 0; i < came; i++) {
			if (!right(&events[i])) {
				printf("ERROR:block %llu is wrong\n", asked[events[i].data].aio_offset / BLOCK);
				return 1;
			}
			sum += asked[events[i].data].aio_offset / SECTOR;
			if (sent < count && ask(context, fd, events[i].data, any(&seed) % size))
				return failed("io_submit");
			sent++;
		}
		done += came;
	}
	clock_gettime(CLOCK_MONOTONIC, &end);
	printf("%ld reads in %lld ns, %llu\n", done,
	       (end.tv_sec - begin.tv_sec) * 1000000000LL + end.tv_nsec - begin.tv_nsec, (unsigned long long)sum);
	return 0;
}

int main(int argc, char **argv)
{
	long count = argc == 5 ? atol(argv[2]) : 0, depth = argc == 5 ? atol(argv[3]) : 0;
	uint64_t seed = argc == 5 ? strtoull(argv[4], NULL, 0) : 0, size;
	int fd;

	if (count < 1 || depth < 1 || depth > DEEPEST || !seed) {
		printf("eg: reads /dev/vda 1000 32 1\n");
		return 1;
	}
	fd = open(argv[1], O_RDONLY | O_DIRECT);
	if (fd < 0)
		return failed(argv[1]);
	if (ioctl(fd, BLKGETSIZE64, &size) || size < BLOCK)
		return failed("BLKGETSIZE64");
	return run(fd, count, depth, size / BLOCK, seed);
}
