// SPDX-License-Identifier: GPL-2.0
/*
 * attack FILE: runs the programs in FILE through /dev/virtio_attack and prints
 * their results, "NAME: HEX HEX ..." for each, in lines of at most LINE results.
 *
 * A program in the file: its name, how many steps it has, the steps. What cannot be
 * run says "NAME! ERROR" and the next one is run.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define STEPS_MAX	8192
#define STEP		24
#define LINE		16

struct header {
	char name[28];
	uint32_t steps;
};

static char steps[STEPS_MAX * STEP];
static uint64_t results[STEPS_MAX];

static void show(const char *name, size_t count)
{
	for (size_t i = 0; i < count || i == 0; i++) {
		if (i % LINE == 0)
			printf("%s%s:", i ? "\n" : "", name);
		if (i < count)
			printf(" %" PRIx64, results[i]);
	}
	printf("\n");
}

int main(int argc, char **argv)
{
	FILE *file = argc == 2 ? fopen(argv[1], "rb") : NULL;
	int device = open("/dev/virtio_attack", O_RDWR | O_CLOEXEC);
	struct header header;

	if (!file || device < 0) {
		fprintf(stderr, "attack: %s: %s\n", file ? "/dev/virtio_attack" : "FILE", strerror(errno));
		return 1;
	}
	while (fread(&header, sizeof(header), 1, file) == 1) {
		ssize_t length;

		header.name[sizeof(header.name) - 1] = '\0';
		if (header.steps > STEPS_MAX || fread(steps, STEP, header.steps, file) != header.steps) {
			fprintf(stderr, "attack: %s: cut short\n", header.name);
			return 1;
		}
		if (write(device, steps, (size_t)header.steps * STEP) < 0) {
			printf("%s! %s\n", header.name, strerror(errno));
			continue;
		}
		length = read(device, results, sizeof(results));
		if (length < 0) {
			fprintf(stderr, "attack: %s: %s\n", header.name, strerror(errno));
			return 1;
		}
		show(header.name, (size_t)length / sizeof(*results));
	}
	return 0;
}
