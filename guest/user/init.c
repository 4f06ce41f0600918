// SPDX-License-Identifier: GPL-2.0
/*
 * The first process of the test guest: runs the commands that the host writes to
 * the console, one a line, and reports each.
 *
 *   insmod NAME [PARAMETER...]   load /lib/modules/NAME.ko
 *   rmmod NAME                   unload it; waits for nothing
 *   run PROGRAM [ARGUMENT...]    run /bin/PROGRAM and wait for it
 *   sh TEXT                      run the rest of the line by the shell of /bin/busybox
 *   start PROGRAM [ARGUMENT...]  run it and go on
 *   kill                         SIGKILL to all that was started
 *   wait                         wait for all that was started; fails if one failed
 *   sleep SECONDS
 *   read PATH                    log the file's lines
 *   write PATH TEXT              one write(); TEXT is the rest of the line
 *   poweroff                     takes PCI functions away first where virtio carries them
 *   halt                         takes nothing away first
 *
 * All output goes through the kernel's log, the programs' included: so it comes out
 * in whole lines and in order with the driver's own. Lines that begin with "guest: "
 * are ours:
 *   guest: ready                 the console is being read
 *   guest: out: TEXT             one line written by a program, or read from a file
 *   guest: end: STATUS COMMAND   the command ended; STATUS is 0, an errno, an exit
 *                                status, or 128 plus the signal that ended it
 * The end of the console (the host went away) means poweroff.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/klog.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#define WORDS 16
#define STARTED 16
#define CONSOLE_LEVEL 8		/* show every level, info and debug included */

static struct {
	pid_t pid;
	int out;
} started[STARTED];
static int kmsg = -1;

static void say(const char *format, ...)
{
	char line[512] = "<6>guest: ";
	size_t start = strlen(line);
	va_list arguments;
	int length;

	va_start(arguments, format);
	length = vsnprintf(line + start, sizeof(line) - start - 1, format, arguments);
	va_end(arguments);
	if (length < 0)
		return;
	/* Without its end of line the kernel keeps a record back, in case it goes on. */
	strcat(line, "\n");
	if (write(kmsg, line, strlen(line)) < 0)
		_exit(1);
}

/* Logs what comes from fd line by line until its end. */
static void relay(int fd)
{
	FILE *stream = fdopen(fd, "r");
	char line[400];

	if (!stream) {
		close(fd);
		return;
	}
	while (fgets(line, sizeof(line), stream)) {
		line[strcspn(line, "\n")] = '\0';
		say("out: %s", line);
	}
	fclose(stream);
}

static int status_of(pid_t pid)
{
	int status;

	while (waitpid(pid, &status, 0) < 0)
		if (errno != EINTR)
			return -errno;
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

/* Starts /bin/PROGRAM with its output on a pipe; the pid, or minus an errno. */
static pid_t start(char **words, int *out)
{
	char path[64];
	int ends[2];
	pid_t pid;

	if (!words[0])
		return -EINVAL;
	snprintf(path, sizeof(path), "/bin/%s", words[0]);
	if (pipe2(ends, O_CLOEXEC))
		return -errno;
	pid = fork();
	if (pid == 0) {
		dup2(ends[1], STDOUT_FILENO);
		dup2(ends[1], STDERR_FILENO);
		execv(path, words);
		dprintf(STDERR_FILENO, "cannot run %s: %s\n", path, strerror(errno));
		_exit(127);
	}
	close(ends[1]);
	if (pid < 0) {
		close(ends[0]);
		return -errno;
	}
	*out = ends[0];
	return pid;
}

static int command_run(char **words)
{
	int out;
	pid_t pid = start(words, &out);

	if (pid < 0)
		return pid;
	relay(out);
	return status_of(pid);
}

static int command_sh(const char *line)
{
	char text[512], *words[] = { "busybox", "sh", "-c", text, NULL };

	snprintf(text, sizeof(text), "%s", line + strlen("sh "));
	return command_run(words);
}

static int command_start(char **words)
{
	for (int i = 0; i < STARTED; i++) {
		if (!started[i].pid) {
			pid_t pid = start(words, &started[i].out);

			if (pid < 0)
				return pid;
			started[i].pid = pid;
			return 0;
		}
	}
	return -EAGAIN;
}

static int command_kill(void)
{
	for (int i = 0; i < STARTED; i++)
		if (started[i].pid)
			kill(started[i].pid, SIGKILL);
	return 0;
}

static int command_wait(void)
{
	int worst = 0;

	for (int i = 0; i < STARTED; i++) {
		int status;

		if (!started[i].pid)
			continue;
		relay(started[i].out);
		status = status_of(started[i].pid);
		started[i].pid = 0;
		if (status)
			worst = status;
	}
	return worst;
}

static int command_insmod(char **words)
{
	char path[64], parameters[256] = "";
	int fd, ret;

	if (!words[0])
		return -EINVAL;
	snprintf(path, sizeof(path), "/lib/modules/%s.ko", words[0]);
	for (int i = 1; words[i]; i++) {
		size_t used = strlen(parameters);

		snprintf(parameters + used, sizeof(parameters) - used, "%s ", words[i]);
	}
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	ret = syscall(SYS_finit_module, fd, parameters, 0) ? -errno : 0;
	close(fd);
	return ret;
}

static int command_rmmod(char **words)
{
	if (!words[0])
		return -EINVAL;
	return syscall(SYS_delete_module, words[0], O_NONBLOCK) ? -errno : 0;
}

static int command_sleep(char **words)
{
	double seconds = words[0] ? atof(words[0]) : 0;

	usleep(seconds * 1e6);
	return 0;
}

static int command_read(char **words)
{
	int fd = words[0] ? open(words[0], O_RDONLY | O_CLOEXEC) : -1;

	if (fd < 0)
		return -errno;
	relay(fd);
	return 0;
}

/* The text begins after the second word of the line. */
static int command_write(const char *line)
{
	char path[256];
	int at, fd, ret;

	if (sscanf(line, "write %255s %n", path, &at) != 1)
		return -EINVAL;
	fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	ret = write(fd, line + at, strlen(line + at)) < 0 ? -errno : 0;
	close(fd);
	return ret;
}

/*
 * In user-mode Linux a virtio device carries the PCI bus. The kernel shuts that one
 * down like any other, and removes the functions behind it only afterwards, when
 * nobody answers for them any more: their drivers would wait for a reset for ever.
 */
static void remove_carried_pci(void)
{
	glob_t found;

	if (glob("/sys/bus/virtio/drivers/virtio-pci/virtio*", 0, NULL, &found))
		return;
	globfree(&found);
	if (glob("/sys/bus/pci/devices/*/remove", 0, NULL, &found))
		return;
	for (size_t i = 0; i < found.gl_pathc; i++) {
		int fd = open(found.gl_pathv[i], O_WRONLY | O_CLOEXEC);

		if (fd < 0 || write(fd, "1", 1) < 0)
			say("cannot write %s: %s", found.gl_pathv[i], strerror(errno));
		close(fd);
	}
	globfree(&found);
}

static void command_poweroff(void)
{
	remove_carried_pci();
	sync();
	reboot(RB_POWER_OFF);
	say("end: %d poweroff", errno);
}

/* 0, a minus errno of our own, or the status of a program. */
static int execute(const char *line)
{
	char copy[512], *words[WORDS + 1] = { NULL }, *rest = copy, *word;
	int count = 0;

	snprintf(copy, sizeof(copy), "%s", line);
	while (count < WORDS && (word = strsep(&rest, " ")))
		if (*word)
			words[count++] = word;

	if (!strcmp(words[0], "insmod"))
		return command_insmod(words + 1);
	if (!strcmp(words[0], "rmmod"))
		return command_rmmod(words + 1);
	if (!strcmp(words[0], "run"))
		return command_run(words + 1);
	if (!strncmp(line, "sh ", 3))
		return command_sh(line);
	if (!strcmp(words[0], "start"))
		return command_start(words + 1);
	if (!strcmp(words[0], "kill"))
		return command_kill();
	if (!strcmp(words[0], "wait"))
		return command_wait();
	if (!strcmp(words[0], "sleep"))
		return command_sleep(words + 1);
	if (!strcmp(words[0], "read"))
		return command_read(words + 1);
	if (!strcmp(words[0], "write"))
		return command_write(line);
	return -EINVAL;
}

/* The host writes plain bytes: no echo, no signals from characters. */
static void set_raw(void)
{
	struct termios terminal;

	if (tcgetattr(STDIN_FILENO, &terminal))
		return;
	cfmakeraw(&terminal);
	terminal.c_iflag |= ICRNL;
	terminal.c_lflag |= ICANON;
	tcsetattr(STDIN_FILENO, TCSANOW, &terminal);
}

static int set_up(void)
{
	mount("proc", "/proc", "proc", 0, NULL);
	mount("sysfs", "/sys", "sysfs", 0, NULL);
	mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
	kmsg = open("/dev/kmsg", O_WRONLY | O_CLOEXEC);
	if (kmsg < 0)
		return -1;
	klogctl(8, NULL, CONSOLE_LEVEL);
	set_raw();
	return 0;
}

int main(void)
{
	char line[512];

	if (set_up()) {
		perror("init: /dev/kmsg");
		command_poweroff();
	}
	say("ready");
	while (fgets(line, sizeof(line), stdin)) {
		line[strcspn(line, "\r\n")] = '\0';
		if (line[strspn(line, " ")] == '\0')
			continue;
		if (!strcmp(line, "poweroff"))
			break;
		if (!strcmp(line, "halt"))
			reboot(RB_HALT_SYSTEM);
		say("end: %d %s", abs(execute(line)), line);
	}
	command_poweroff();
	return 1;
}
