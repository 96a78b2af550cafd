// A CUDA driver of a machine that has one in name: what it answers is in the environment. For tests of what the user is
// told; it runs no kernel.
#include <stdlib.h>
#include <string.h>

static int number(const char *name, int otherwise) {
    const char *value = getenv(name);
    return value ? atoi(value) : otherwise;
}

int cuInit(unsigned flags) { return number("FAKE_INIT", 0); }
int cuGetErrorString(int error, const char **text) {
    *text = error == 100 ? "no CUDA-capable device is detected" : "an error of the fake driver";
    return 0;
}
int cuDriverGetVersion(int *version) { return *version = number("FAKE_DRIVER", 13000), 0; }
int cuDeviceGetCount(int *count) { return *count = number("FAKE_DEVICES", 1), 0; }
int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, 0; }
int cuDeviceGetName(char *name, int length, int device) { return strncpy(name, "Fake GPU", length), 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    // Compute capability: 75 is its major part, 76 its minor.
    int capability = number("FAKE_CAPABILITY", 90);
    return *value = attribute == 75 ? capability / 10 : capability % 10, 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = context, 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuStreamCreate(void **stream, unsigned flags) { return *stream = stream, 0; }
int cuStreamDestroy_v2(void *stream) { return 0; }
int cuStreamSynchronize(void *stream) { return 0; }
int cuDeviceGetDefaultMemPool(void **pool, int device) { return *pool = pool, 0; }
int cuMemPoolSetAttribute(void *pool, int attribute, void *value) { return 0; }
int cuMemPoolTrimTo(void *pool, size_t bytes) { return 0; }
int cuMemGetInfo_v2(size_t *free, size_t *total) { return *free = 1000, *total = 2000, 0; }
int cuMemAllocAsync(unsigned long long *address, size_t bytes, void *stream) {
    if (bytes > (size_t)number("FAKE_MEMORY", 1 << 30)) return 2;
    return *address = (unsigned long long)malloc(bytes), 0;
}
int cuMemFreeAsync(unsigned long long address, void *stream) { return free((void *)address), 0; }
int cuMemcpyHtoDAsync_v2(unsigned long long to, const void *from, size_t bytes, void *stream) {
    return memcpy((void *)to, from, bytes), 0;
}
