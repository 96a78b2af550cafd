// An NVRTC that compiles nothing: its version, and what it answers, are in the environment.
#include <stdlib.h>
#include <string.h>

int nvrtcVersion(int *major, int *minor) {
    const char *value = getenv("FAKE_NVRTC");
    return *major = value ? atoi(value) : 13, *minor = 0, 0;
}
int nvrtcGetNumSupportedArchs(int *count) { return *count = 2, 0; }
int nvrtcGetSupportedArchs(int *all) { return all[0] = 80, all[1] = 90, 0; }
const char *nvrtcGetErrorString(int result) { return "an error of the fake compiler"; }
int nvrtcCreateProgram(void **program, const char *source, const char *name, int count, const char **headers, const char **names) {
    return *program = program, 0;
}
int nvrtcDestroyProgram(void **program) { return 0; }
int nvrtcCompileProgram(void *program, int count, const char **options) { return 6; }
static const char text[] = "kernel.cu(7): error: \"y\" is undefined";
int nvrtcGetProgramLogSize(void *program, size_t *bytes) { return *bytes = sizeof text, 0; }
int nvrtcGetProgramLog(void *program, char *log) { return memcpy(log, text, sizeof text), 0; }
