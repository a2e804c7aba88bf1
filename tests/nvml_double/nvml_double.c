/* A stand-in for libnvidia-ml.so.1 that answers from a text file, read anew at each call.
 *
 * The file is named by the environment variable NVML_DOUBLE_STATE. Each line is `key value`; keys of a GPU start
 * with its index:
 *
 *     count 2
 *     0.uuid GPU-aaaa            (also name, memory in bytes, compute_mode, mig)
 *     1.handle.error 15          (the call fails with this nvmlReturn_t; also init.error, count.error, ...)
 *
 * What is not in the file is NVML_ERROR_NOT_SUPPORTED, as real drivers answer for what a GPU does not have; the
 * handle of a GPU below `count` needs no line. Signatures are those of nvml.h, as nvidia-ml-py calls them.
 */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    SUCCESS = 0,
    UNINITIALIZED = 1,
    INVALID_ARGUMENT = 2,
    NOT_SUPPORTED = 3,
    INSUFFICIENT_SIZE = 7,
    UNKNOWN = 999,
};

typedef struct {
    unsigned long long total, free, used;
} nvmlMemory_t;

typedef void *nvmlDevice_t;

static int initialised = 0;

/* Copies the value of `key` to `value`; 0 if there is no such line. */
static int find(const char *key, char *value, size_t size)
{
    const char *path = getenv("NVML_DOUBLE_STATE");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[512];
    size_t length = strlen(key);
    int found = 0;
    if (!file)
        return 0;
    while (!found && fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = '\0';
        if (strncmp(line, key, length) == 0 && line[length] == ' ') {
            snprintf(value, size, "%s", line + length + 1);
            found = 1;
        }
    }
    fclose(file);
    return found;
}

/* The error that the file demands for `key`, or SUCCESS. */
static int demanded_error(const char *key)
{
    char error_key[128], value[64];
    snprintf(error_key, sizeof error_key, "%s.error", key);
    return find(error_key, value, sizeof value) ? atoi(value) : SUCCESS;
}

static int answer(const char *key, char *value, size_t size)
{
    int error;
    if (!initialised)
        return UNINITIALIZED;
    error = demanded_error(key);
    if (error != SUCCESS)
        return error;
    return find(key, value, size) ? SUCCESS : NOT_SUPPORTED;
}

/* The answer about one GPU. A handle is its index plus one, so that none is NULL. */
static int answer_of(nvmlDevice_t device, const char *what, char *value, size_t size)
{
    char key[128];
    if (!device)
        return INVALID_ARGUMENT;
    snprintf(key, sizeof key, "%ld.%s", (long)device - 1, what);
    return answer(key, value, size);
}

static int text_of(nvmlDevice_t device, const char *what, char *text, unsigned size)
{
    char value[512];
    int status = answer_of(device, what, value, sizeof value);
    if (status != SUCCESS)
        return status;
    if (strlen(value) >= size)
        return INSUFFICIENT_SIZE;
    strcpy(text, value);
    return SUCCESS;
}

static int number_of(nvmlDevice_t device, const char *what, unsigned long long *number)
{
    char value[64];
    int status = answer_of(device, what, value, sizeof value);
    if (status == SUCCESS)
        *number = strtoull(value, NULL, 10);
    return status;
}

int nvmlInitWithFlags(unsigned flags)
{
    int error = demanded_error("init");
    (void)flags;
    if (error == SUCCESS)
        initialised++;
    return error;
}

int nvmlShutdown(void)
{
    if (!initialised)
        return UNINITIALIZED;
    initialised--;
    return demanded_error("shutdown");
}

const char *nvmlErrorString(int result)
{
    static char text[64];
    snprintf(text, sizeof text, "double's error %d", result);
    return text;
}

int nvmlDeviceGetCount_v2(unsigned *count)
{
    char value[64];
    int status = answer("count", value, sizeof value);
    if (status == SUCCESS)
        *count = (unsigned)strtoul(value, NULL, 10);
    return status;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, nvmlDevice_t *device)
{
    char key[64];
    unsigned count;
    int status = nvmlDeviceGetCount_v2(&count);
    if (status != SUCCESS)
        return status;
    if (index >= count)
        return INVALID_ARGUMENT;
    snprintf(key, sizeof key, "%u.handle", index);
    *device = (nvmlDevice_t)((long)index + 1);
    return demanded_error(key);
}

int nvmlDeviceGetUUID(nvmlDevice_t device, char *uuid, unsigned length)
{
    return text_of(device, "uuid", uuid, length);
}

int nvmlDeviceGetName(nvmlDevice_t device, char *name, unsigned length)
{
    return text_of(device, "name", name, length);
}

int nvmlDeviceGetMemoryInfo(nvmlDevice_t device, nvmlMemory_t *memory)
{
    unsigned long long total;
    int status = number_of(device, "memory", &total);
    if (status == SUCCESS)
        *memory = (nvmlMemory_t){.total = total, .free = total, .used = 0};
    return status;
}

int nvmlDeviceGetComputeMode(nvmlDevice_t device, unsigned *mode)
{
    unsigned long long number;
    int status = number_of(device, "compute_mode", &number);
    if (status == SUCCESS)
        *mode = (unsigned)number;
    return status;
}

#ifndef OLD_DRIVER /* before version 450 */
int nvmlDeviceGetMigMode(nvmlDevice_t device, unsigned *current, unsigned *pending)
{
    unsigned long long number;
    int status = number_of(device, "mig", &number);
    if (status == SUCCESS)
        *current = *pending = (unsigned)number;
    return status;
}
#endif
