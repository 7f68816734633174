/* A container plugin for tests: the srun options that the launchers use, over real mounts.
 *
 * Each task gets a mount namespace of its own whose root is an overlay: the squashfs image below, memory above.
 * Into it go /dev, /proc and /sys, the folders that the administrator names in plugstack.conf ("share=/a:/b"), and
 * what --container-mounts asks for. Unlike a real runtime it knows no user namespaces and no image environment,
 * except that PATH becomes the image's.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <slurm/spank.h>

SPANK_PLUGIN(image_for_tests, 1);

enum { IMAGE = 1, MOUNTS, WORKDIR, IGNORED };
static const char *asked[IGNORED + 1];

static int remember(int which, const char *value, int remote)
{
	asked[which] = value ? strdup(value) : "";
	return 0;
}

static struct spank_option options[] = {
	{"container-image", "FILE", "squashfs image to run in", 1, IMAGE, remember},
	{"container-mounts", "SRC:DST[:ro],...", "folders of the node seen inside", 1, MOUNTS, remember},
	{"container-workdir", "DIR", "where the command starts", 1, WORKDIR, remember},
	{"no-container-mount-home", NULL, "accepted", 0, IGNORED, remember},
	{"no-container-entrypoint", NULL, "accepted", 0, IGNORED, remember},
	SPANK_OPTIONS_TABLE_END,
};

int slurm_spank_init(spank_t spank, int argc, char **argv)
{
	for (int i = 0; options[i].name; i++)
		if (spank_option_register(spank, &options[i]) != ESPANK_SUCCESS)
			return -1;
	return 0;
}

static int refuse(const char *step, const char *what)
{
	slurm_error("image: %s %s: %s", step, what, strerror(errno));
	return -1;
}

static int wait_for(char *const argv[])
{
	int status;
	pid_t child = fork();
	if (child == 0) {
		execvp(argv[0], argv);
		_exit(127);
	}
	if (child < 0 || waitpid(child, &status, 0) != child || status != 0) {
		errno = EIO;
		return -1;
	}
	return 0;
}

static int make_folders(const char *path)
{
	char part[PATH_MAX];
	snprintf(part, sizeof part, "%s", path);
	for (char *p = part + 1; *p; p++)
		if (*p == '/') {
			*p = 0;
			mkdir(part, 0755);
			*p = '/';
		}
	return mkdir(part, 0755) == 0 || errno == EEXIST ? 0 : -1;
}

/* Show the node's folder `from` as `to` under the new root. */
static int show(const char *root, const char *from, const char *to, int read_only)
{
	char target[PATH_MAX];
	struct stat found;
	snprintf(target, sizeof target, "%s%s", root, to);
	if (stat(from, &found))
		return refuse("mount source", from);
	if (make_folders(target) || mount(from, target, NULL, MS_BIND | MS_REC, NULL))
		return refuse("mounting", to);
	if (read_only && mount(NULL, target, NULL, MS_REMOUNT | MS_BIND | MS_RDONLY, NULL))
		return refuse("making read-only", to);
	return 0;
}

static int show_asked(const char *root)
{
	char *list = strdup(asked[MOUNTS] ? asked[MOUNTS] : ""), *rest = list, *one;
	while ((one = strsep(&rest, ",")) && *one) {
		char *from = strsep(&one, ":"), *to = strsep(&one, ":");
		if (show(root, from, to ? to : from, one && !strcmp(one, "ro")))
			return -1;
	}
	free(list);
	return 0;
}

static int show_shared(const char *root, int argc, char **argv)
{
	for (int i = 0; i < argc; i++) {
		if (strncmp(argv[i], "share=", 6))
			continue;
		char *list = strdup(argv[i] + 6), *rest = list, *one;
		while ((one = strsep(&rest, ":")))
			if (show(root, one, one, 0))
				return -1;
		free(list);
	}
	return 0;
}

int slurm_spank_task_init_privileged(spank_t spank, int argc, char **argv)
{
	char base[] = "/run/cx-image-XXXXXX", lower[64], root[64], how[512];
	if (!asked[IMAGE])
		return 0;
	if (access(asked[IMAGE], R_OK))
		return refuse("image", asked[IMAGE]);
	if (unshare(CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL))
		return refuse("namespace for", asked[IMAGE]);
	if (!mkdtemp(base) || mount("tmpfs", base, "tmpfs", 0, "mode=755"))
		return refuse("folder", base);
	snprintf(lower, sizeof lower, "%s/lower", base);
	snprintf(root, sizeof root, "%s/root", base);
	snprintf(how, sizeof how, "%s/upper", base);
	if (make_folders(lower) || make_folders(root) || make_folders(how))
		return refuse("folder", base);
	snprintf(how, sizeof how, "%s/work", base);
	if (make_folders(how))
		return refuse("folder", how);
	char *mounting[] = {"mount", "-t", "squashfs", "-o", "loop,ro", (char *)asked[IMAGE], lower, NULL};
	if (wait_for(mounting))
		return refuse("image", asked[IMAGE]);
	snprintf(how, sizeof how, "lowerdir=%s,upperdir=%s/upper,workdir=%s/work", lower, base, base);
	if (mount("overlay", root, "overlay", 0, how))
		return refuse("overlay", root);
	const char *kernel[] = {"/dev", "/proc", "/sys", NULL};
	for (int i = 0; kernel[i]; i++)
		if (show(root, kernel[i], kernel[i], 0))
			return -1;
	if (show_shared(root, argc, argv) || show_asked(root))
		return -1;
	if (chroot(root) || chdir(asked[WORKDIR] ? asked[WORKDIR] : "/"))
		return refuse("entering", asked[IMAGE]);
	return 0;
}

int slurm_spank_task_init(spank_t spank, int argc, char **argv)
{
	if (!asked[IMAGE])
		return 0;
	spank_setenv(spank, "PATH", "/image/bin:/usr/bin:/bin", 1);
	return chdir(asked[WORKDIR] ? asked[WORKDIR] : "/") ? refuse("entering", asked[WORKDIR]) : 0;
}
