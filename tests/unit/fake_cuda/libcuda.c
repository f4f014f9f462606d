/* A CUDA driver without a GPU: it records what is asked of it, for tests of the launcher.

   Every call becomes a line of the file FAKE_CUDA_RECORD: the function's name, then its values in order.
   A "cubin" is text, "KERNEL SIZE SIZE ...": a kernel and the sizes of its parameters in bytes, hidden ones
   included. So a launch records the very bytes that a GPU would have got.
   FAKE_CUDA_ARCH is the compute capability; FAKE_CUDA_FAIL, "FUNCTION CODE", makes a function fail. */

#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_PARAMETERS 64
#define MAX_NAME 127
#define MAX_LINE 8192

enum { SUCCESS = 0, INVALID_VALUE = 1, INVALID_IMAGE = 200, NOT_FOUND = 500 };

typedef struct {
    char name[MAX_NAME + 1];
    int num_parameters;
    int sizes[MAX_PARAMETERS];
} Module;

typedef struct {
    unsigned id;
    char pad[4];
    unsigned value[16];
} LaunchAttribute;

typedef struct {
    unsigned grid[3], block[3], shared;
    void *stream;
    LaunchAttribute *attributes;
    unsigned num_attributes;
} LaunchConfig;

static int context; /* its address is the handle */

/* Records a call; the result is what it has to return. */
static int called(const char *function, const char *format, ...) {
    char line[MAX_LINE], failing[MAX_NAME + 1] = "";
    int length = snprintf(line, sizeof line, "%s", function), code = SUCCESS;
    FILE *file = fopen(getenv("FAKE_CUDA_RECORD"), "a");
    va_list values;
    va_start(values, format);
    vsnprintf(line + length, sizeof line - length, format, values);
    va_end(values);
    fprintf(file, "%s\n", line); /* in one piece, so that lines of several threads do not mix */
    fclose(file);
    if (getenv("FAKE_CUDA_FAIL")) sscanf(getenv("FAKE_CUDA_FAIL"), "%127s %d", failing, &code);
    return strcmp(failing, function) ? SUCCESS : code;
}

int cuInit(unsigned flags) { return called("cuInit", " %u", flags); }

int cuDriverGetVersion(int *version) {
    *version = 13000;
    return SUCCESS;
}

int cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return called("cuDeviceGet", " %d", ordinal);
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    int arch = atoi(getenv("FAKE_CUDA_ARCH"));
    *value = attribute == 75 ? arch / 10 : attribute == 76 ? arch % 10 : attribute == 16 ? 132 : -1;
    return called("cuDeviceGetAttribute", " %d %d", attribute, device);
}

int cuDevicePrimaryCtxRetain(void **result, int device) {
    *result = &context;
    return called("cuDevicePrimaryCtxRetain", " %d", device);
}

int cuCtxPushCurrent(void *pushed) { return called("cuCtxPushCurrent", " %d", pushed == &context); }

int cuCtxPopCurrent(void **popped) {
    *popped = &context;
    return called("cuCtxPopCurrent", "");
}

int cuModuleLoadData(void **result, const char *image) {
    Module *module = calloc(1, sizeof *module);
    int at = 0, size, read;
    if (sscanf(image, "%127s%n", module->name, &at) != 1) return INVALID_IMAGE;
    for (; sscanf(image + at, "%d%n", &size, &read) == 1; at += read)
        module->sizes[module->num_parameters++] = size;
    *result = module;
    return called("cuModuleLoadData", " %s", module->name);
}

int cuModuleGetFunction(void **result, Module *module, const char *name) {
    *result = module;
    return strcmp(module->name, name) ? NOT_FOUND : called("cuModuleGetFunction", " %s", name);
}

int cuFuncLoad(Module *function) { return called("cuFuncLoad", " %s", function->name); }

int cuFuncSetAttribute(Module *function, int attribute, int value) {
    return called("cuFuncSetAttribute", " %s %d %d", function->name, attribute, value);
}

int cuLaunchKernelEx(const LaunchConfig *config, Module *function, void **parameters, void **extra) {
    char text[MAX_LINE];
    int at = 0, i, byte;
    if (extra) return INVALID_VALUE;
    for (i = 0; i < (int)config->num_attributes; i++) {
        const LaunchAttribute *attribute = &config->attributes[i];
        at += sprintf(text + at, " attribute=%u:%u,%u,%u", attribute->id, attribute->value[0],
                      attribute->value[1], attribute->value[2]);
    }
    for (i = 0; i < function->num_parameters; i++) {
        at += sprintf(text + at, " ");
        for (byte = 0; byte < function->sizes[i]; byte++)
            at += sprintf(text + at, "%02x", ((unsigned char *)parameters[i])[byte]);
    }
    return called("cuLaunchKernelEx", " %s %u,%u,%u %u,%u,%u %u %p%s", function->name, config->grid[0],
                  config->grid[1], config->grid[2], config->block[0], config->block[1], config->block[2],
                  config->shared, config->stream, text);
}

int cuGetErrorName(int code, const char **text) {
    *text = code == 1 ? "CUDA_ERROR_INVALID_VALUE" : code == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS" : NULL;
    return *text ? SUCCESS : INVALID_VALUE;
}

int cuGetErrorString(int code, const char **text) {
    *text = code == 1 ? "invalid argument" : code == 700 ? "an illegal memory access was encountered" : NULL;
    return *text ? SUCCESS : INVALID_VALUE;
}

#define ENTRY(name) {#name, (void *)name}
static const struct {
    const char *name;
    void *function;
} FUNCTIONS[] = {
    ENTRY(cuInit), ENTRY(cuDriverGetVersion), ENTRY(cuDeviceGet), ENTRY(cuDeviceGetAttribute),
    ENTRY(cuDevicePrimaryCtxRetain), ENTRY(cuCtxPushCurrent), ENTRY(cuCtxPopCurrent), ENTRY(cuModuleLoadData),
    ENTRY(cuModuleGetFunction), ENTRY(cuFuncLoad), ENTRY(cuFuncSetAttribute), ENTRY(cuLaunchKernelEx),
    ENTRY(cuGetErrorName), ENTRY(cuGetErrorString),
};

/* How the bindings find all functions but this one; those that are missing here fail when they are called. */
int cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *status) {
    size_t i;
    (void)version, (void)flags;
    *function = NULL;
    for (i = 0; i < sizeof FUNCTIONS / sizeof *FUNCTIONS; i++)
        if (!strcmp(FUNCTIONS[i].name, name)) *function = FUNCTIONS[i].function;
    if (status) *status = !*function;
    return *function ? SUCCESS : NOT_FOUND;
}
