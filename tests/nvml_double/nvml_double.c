/* A stand-in for libnvidia-ml.so.1 that answers from a text file, read anew at each call.
 *
 * The file is named by the environment variable NVML_DOUBLE_STATE. Each line is `key value`; keys of a GPU start
 * with its index, those of MIG instance 1 of GPU 0 with `0.mig.1`:
 *
 *     count 2                    (also driver and nvml: versions as text; cuda: a version as 12080)
 *     0.uuid GPU-aaaa            (also name, compute_mode, mig, pci, utilisation in percent)
 *     0.memory 25769803776       (bytes; also memory_used, and memory_reserved for the driver, part of neither)
 *     0.compute 4711:1048576 4712:-      (processes and their bytes; `-` is "not available"; also 0.graphics)
 *     0.ecc 0                    (volatile uncorrected errors)
 *     0.remapped 0 0 0 1         (rows remapped for corrected, uncorrected errors; pending; failed)
 *     0.mig.1.uuid MIG-bbbb      (also name, memory, ...)
 *     topology.0.1 20            (nvmlGpuTopologyLevel_t between GPU 0 and GPU 1, the smaller index first)
 *     nvlink.0.1 0               (nvmlGpuP2PStatus_t of NVLink between them)
 *     1.handle.error 15          (the call fails with this nvmlReturn_t; also init.error, 0.memory.error, ...)
 *     1.*.error 15               (every call about GPU 1 or an instance of it fails so)
 *     calls /tmp/calls           (each initialisation and shutdown adds a line to this file)
 *
 * What is not in the file is NVML_ERROR_NOT_SUPPORTED, as real drivers answer for what a GPU does not have; the
 * handle of a GPU below `count` needs no line, nor do processes and used memory where there are none.
 * Signatures and structures are those of nvml.h, as nvidia-ml-py calls them. DRIVER is the version of the driver that
 * the library is of: symbols that came later are missing.
 */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef DRIVER
#define DRIVER 999
#endif

enum {
    SUCCESS = 0,
    UNINITIALIZED = 1,
    INVALID_ARGUMENT = 2,
    NOT_SUPPORTED = 3,
    NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7,
    ARGUMENT_VERSION_MISMATCH = 25,
    UNKNOWN = 999,
};

enum { MOST_GPUS = 64, MOST_INSTANCES = 8, KEY = 160, LINE = 2048 };

#define NOT_AVAILABLE (~0ULL)

typedef struct {
    unsigned long long total, free, used;
} nvmlMemory_t;

typedef struct {
    unsigned version;
    unsigned long long total, reserved, free, used;
} nvmlMemory_v2_t;

typedef struct {
    unsigned gpu, memory;
} nvmlUtilization_t;

typedef struct {
    unsigned pid;
    unsigned long long memory;
    unsigned gpu_instance, compute_instance;
} nvmlProcessInfo_t;

typedef struct {
    char busIdLegacy[16];
    unsigned domain, bus, device, pciDeviceId, pciSubSystemId;
    char busId[32];
} nvmlPciInfo_t;

/* A GPU's index plus one, so that none is NULL, plus the number of a MIG instance plus one, times MOST_GPUS. */
typedef void *nvmlDevice_t;

static int initialised = 0;

/* Copies the value of `key` to `value`; 0 if there is no such line. */
static int find(const char *key, char *value, size_t size)
{
    const char *path = getenv("NVML_DOUBLE_STATE");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[LINE];
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
    char error_key[KEY + 8], value[64];
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

static void note(const char *call)
{
    char path[LINE];
    FILE *file = find("calls", path, sizeof path) ? fopen(path, "a") : NULL;
    if (file) {
        fprintf(file, "%s\n", call);
        fclose(file);
    }
}

static nvmlDevice_t handle_of(unsigned gpu, int instance)
{
    return (nvmlDevice_t)((long)gpu + 1 + (instance + 1L) * MOST_GPUS);
}

static unsigned gpu_of(nvmlDevice_t device)
{
    return (unsigned)(((long)device - 1) % MOST_GPUS);
}

static int instance_of(nvmlDevice_t device)
{
    return (int)(((long)device - 1) / MOST_GPUS) - 1;
}

static void key_of(nvmlDevice_t device, const char *what, char *key)
{
    if (instance_of(device) < 0)
        snprintf(key, KEY, "%u.%s", gpu_of(device), what);
    else
        snprintf(key, KEY, "%u.mig.%d.%s", gpu_of(device), instance_of(device), what);
}

/* The error that the file demands for all calls about a GPU, or for this one. */
static int error_of(nvmlDevice_t device, const char *what)
{
    char key[KEY];
    int error;
    snprintf(key, sizeof key, "%u.*", gpu_of(device));
    error = demanded_error(key);
    if (error != SUCCESS)
        return error;
    key_of(device, what, key);
    return demanded_error(key);
}

/* The answer about one GPU or MIG instance. */
static int answer_of(nvmlDevice_t device, const char *what, char *value, size_t size)
{
    char key[KEY];
    int error;
    if (!device)
        return INVALID_ARGUMENT;
    error = error_of(device, what);
    if (error != SUCCESS)
        return error;
    key_of(device, what, key);
    return answer(key, value, size);
}

static int text_of(nvmlDevice_t device, const char *what, char *text, unsigned size)
{
    char value[LINE];
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

static int unsigned_of(nvmlDevice_t device, const char *what, unsigned *number)
{
    unsigned long long value;
    int status = number_of(device, what, &value);
    if (status == SUCCESS)
        *number = (unsigned)value;
    return status;
}

int nvmlInitWithFlags(unsigned flags)
{
    int error = demanded_error("init");
    (void)flags;
    note("init");
    if (error == SUCCESS)
        initialised++;
    return error;
}

int nvmlShutdown(void)
{
    if (!initialised)
        return UNINITIALIZED;
    note("shutdown");
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

static int system_text(const char *key, char *text, unsigned size)
{
    char value[LINE];
    int status = answer(key, value, sizeof value);
    if (status == SUCCESS)
        snprintf(text, size, "%s", value);
    return status;
}

int nvmlSystemGetDriverVersion(char *version, unsigned size)
{
    return system_text("driver", version, size);
}

int nvmlSystemGetNVMLVersion(char *version, unsigned size)
{
    return system_text("nvml", version, size);
}

int nvmlSystemGetCudaDriverVersion_v2(int *version)
{
    char value[64];
    int status = answer("cuda", value, sizeof value);
    if (status == SUCCESS)
        *version = atoi(value);
    return status;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, nvmlDevice_t *device)
{
    unsigned count;
    int status = nvmlDeviceGetCount_v2(&count);
    if (status != SUCCESS)
        return status;
    if (index >= count)
        return INVALID_ARGUMENT;
    *device = handle_of(index, -1);
    return error_of(*device, "handle");
}

int nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice_t *device)
{
    unsigned count;
    int status = nvmlDeviceGetCount_v2(&count);
    if (status != SUCCESS)
        return status;
    for (unsigned index = 0; index < count; index++)
        for (int instance = -1; instance < MOST_INSTANCES; instance++) {
            char key[KEY], found[LINE];
            key_of(handle_of(index, instance), "uuid", key);
            if (!find(key, found, sizeof found) || strcmp(found, uuid) != 0)
                continue;
            *device = handle_of(index, instance);
            return error_of(*device, "handle");
        }
    return NOT_FOUND;
}

int nvmlDeviceGetUUID(nvmlDevice_t device, char *uuid, unsigned length)
{
    return text_of(device, "uuid", uuid, length);
}

int nvmlDeviceGetName(nvmlDevice_t device, char *name, unsigned length)
{
    return text_of(device, "name", name, length);
}

static int memory_of(nvmlDevice_t device, nvmlMemory_v2_t *memory)
{
    unsigned long long total, used = 0, reserved = 0;
    int status = number_of(device, "memory", &total);
    if (status != SUCCESS)
        return status;
    number_of(device, "memory_used", &used);
    number_of(device, "memory_reserved", &reserved);
    memory->total = total;
    memory->used = used;
    memory->reserved = reserved;
    memory->free = total - used - reserved;
    return SUCCESS;
}

/* Here, what the driver keeps for itself counts as used. */
int nvmlDeviceGetMemoryInfo(nvmlDevice_t device, nvmlMemory_t *memory)
{
    nvmlMemory_v2_t all;
    int status = memory_of(device, &all);
    if (status == SUCCESS)
        *memory = (nvmlMemory_t){.total = all.total, .free = all.free, .used = all.used + all.reserved};
    return status;
}

int nvmlDeviceGetComputeMode(nvmlDevice_t device, unsigned *mode)
{
    return unsigned_of(device, "compute_mode", mode);
}

int nvmlDeviceGetPciInfo_v3(nvmlDevice_t device, nvmlPciInfo_t *pci)
{
    memset(pci, 0, sizeof *pci);
    return text_of(device, "pci", pci->busId, sizeof pci->busId);
}

int nvmlDeviceGetUtilizationRates(nvmlDevice_t device, nvmlUtilization_t *rates)
{
    rates->memory = 0;
    return unsigned_of(device, "utilisation", &rates->gpu);
}

int nvmlDeviceGetTotalEccErrors(nvmlDevice_t device, unsigned type, unsigned counter, unsigned long long *count)
{
    if (type != 1 || counter != 0)
        return INVALID_ARGUMENT;
    return number_of(device, "ecc", count);
}

static int pair_of(const char *what, nvmlDevice_t one, nvmlDevice_t other, unsigned *number)
{
    char key[KEY], value[64];
    unsigned low = gpu_of(one), high = gpu_of(other);
    int status;
    if (!one || !other || instance_of(one) >= 0 || instance_of(other) >= 0)
        return INVALID_ARGUMENT;
    snprintf(key, sizeof key, "%s.%u.%u", what, low < high ? low : high, low < high ? high : low);
    status = answer(key, value, sizeof value);
    if (status == SUCCESS)
        *number = (unsigned)strtoul(value, NULL, 10);
    return status;
}

int nvmlDeviceGetTopologyCommonAncestor(nvmlDevice_t one, nvmlDevice_t other, unsigned *level)
{
    return pair_of("topology", one, other, level);
}

int nvmlDeviceGetP2PStatus(nvmlDevice_t one, nvmlDevice_t other, unsigned capability, unsigned *status)
{
    if (capability != 2)
        return INVALID_ARGUMENT;
    return pair_of("nvlink", one, other, status);
}

#if DRIVER >= 450
/* As the driver: `count` is room on the way in and need on the way out, and without room the need is all there is. */
static int processes_of(nvmlDevice_t device, const char *what, unsigned *count, nvmlProcessInfo_t *processes)
{
    char value[LINE];
    unsigned room = processes ? *count : 0, need = 0;
    char key[KEY];
    int status = answer_of(device, what, value, sizeof value);
    *count = 0;
    key_of(device, what, key);
    if (status == NOT_SUPPORTED && demanded_error(key) == SUCCESS)
        return SUCCESS;
    if (status != SUCCESS)
        return status;
    for (char *entry = strtok(value, " "); entry; entry = strtok(NULL, " ")) {
        char *memory = strchr(entry, ':');
        if (need < room)
            processes[need] = (nvmlProcessInfo_t){
                .pid = (unsigned)strtoul(entry, NULL, 10),
                .memory = memory && memory[1] != '-' ? strtoull(memory + 1, NULL, 10) : NOT_AVAILABLE,
                .gpu_instance = ~0U,
                .compute_instance = ~0U,
            };
        need++;
    }
    *count = need;
    return need > room ? INSUFFICIENT_SIZE : SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v2(nvmlDevice_t device, unsigned *count, nvmlProcessInfo_t *processes)
{
    return processes_of(device, "compute", count, processes);
}

int nvmlDeviceGetGraphicsRunningProcesses_v2(nvmlDevice_t device, unsigned *count, nvmlProcessInfo_t *processes)
{
    return processes_of(device, "graphics", count, processes);
}

int nvmlDeviceGetMigMode(nvmlDevice_t device, unsigned *current, unsigned *pending)
{
    int status = unsigned_of(device, "mig", current);
    if (status == SUCCESS)
        *pending = *current;
    return status;
}

int nvmlDeviceGetMaxMigDeviceCount(nvmlDevice_t device, unsigned *count)
{
    unsigned mode, pending;
    int status = nvmlDeviceGetMigMode(device, &mode, &pending);
    *count = status == SUCCESS && mode ? MOST_INSTANCES - 1 : 0;
    return status;
}

int nvmlDeviceGetMigDeviceHandleByIndex(nvmlDevice_t device, unsigned index, nvmlDevice_t *instance)
{
    char key[KEY], value[LINE];
    int error;
    if (!device || instance_of(device) >= 0 || index >= MOST_INSTANCES - 1)
        return INVALID_ARGUMENT;
    *instance = handle_of(gpu_of(device), (int)index);
    error = error_of(*instance, "handle");
    if (error != SUCCESS)
        return error;
    key_of(*instance, "uuid", key);
    return find(key, value, sizeof value) ? SUCCESS : NOT_FOUND;
}

int nvmlDeviceGetRemappedRows(nvmlDevice_t device, unsigned *corrected, unsigned *uncorrected, unsigned *pending,
                              unsigned *failed)
{
    char value[LINE];
    int status = answer_of(device, "remapped", value, sizeof value);
    if (status != SUCCESS)
        return status;
    return sscanf(value, "%u %u %u %u", corrected, uncorrected, pending, failed) == 4 ? SUCCESS : UNKNOWN;
}
#endif

#if DRIVER >= 510
int nvmlDeviceGetMemoryInfo_v2(nvmlDevice_t device, nvmlMemory_v2_t *memory)
{
    if (memory->version != (sizeof(nvmlMemory_v2_t) | 2U << 24))
        return ARGUMENT_VERSION_MISMATCH;
    return memory_of(device, memory);
}

int nvmlDeviceGetComputeRunningProcesses_v3(nvmlDevice_t device, unsigned *count, nvmlProcessInfo_t *processes)
{
    return processes_of(device, "compute", count, processes);
}

int nvmlDeviceGetGraphicsRunningProcesses_v3(nvmlDevice_t device, unsigned *count, nvmlProcessInfo_t *processes)
{
    return processes_of(device, "graphics", count, processes);
}
#endif
