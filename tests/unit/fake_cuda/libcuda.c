/* A CUDA driver without a GPU: it records what is asked of it, for tests of what calls it.

   Every call becomes a line of the file FAKE_CUDA_RECORD: the function's name, then its values in order.
   A "cubin" is text, "KERNEL SIZE SIZE ...": a kernel and the sizes of its parameters in bytes, hidden ones
   included. So a launch records the very bytes that a GPU would have got.
   FAKE_CUDA_ARCH is the compute capability; FAKE_CUDA_FAIL, "FUNCTION CODE", makes a function fail.

   Device memory is host memory, FAKE_CUDA_BYTES of it; all that is allocated is full of ones. A stream does its work, copies and host
   functions, when it is synchronized and not before, and refuses copies from or to device memory that nobody
   has allocated, and any work of a thread in which no context is current. */

#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_PARAMETERS 64
#define MAX_NAME 127
#define MAX_LINE 8192

#define MAX_ALLOCATIONS 1024

enum {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    NOT_FOUND = 500
};

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

/* Memory is filled, or copied, or a function is called. */
typedef struct Work {
    unsigned char *target;
    const unsigned char *source;
    size_t num_bytes;
    unsigned char value;
    void (*function)(void *);
    void *data;
    struct Work *next;
} Work;

typedef struct {
    Work *first, *last;
} Graph;

typedef struct {
    Graph queue, *capturing;
} Stream;

static int context; /* its address is the handle */
static __thread int is_current;
static struct {
    unsigned char *begin;
    size_t num_bytes;
} allocations[MAX_ALLOCATIONS];
static size_t allocated_bytes;

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

int cuCtxSetCurrent(void *made) {
    is_current = made == &context;
    return called("cuCtxSetCurrent", " %d", is_current);
}

static size_t total_bytes(void) {
    const char *text = getenv("FAKE_CUDA_BYTES");
    return text ? strtoull(text, NULL, 10) : (size_t)1 << 30;
}

int cuMemGetInfo(size_t *free_bytes, size_t *total) {
    *total = total_bytes();
    *free_bytes = *total - allocated_bytes;
    return called("cuMemGetInfo", "");
}

int cuMemAlloc(unsigned long long *pointer, size_t num_bytes) {
    int i, code = called("cuMemAlloc", " %zu", num_bytes);
    if (code) return code;
    if (num_bytes > total_bytes() - allocated_bytes) return OUT_OF_MEMORY;
    for (i = 0; allocations[i].begin; i++)
        if (i == MAX_ALLOCATIONS - 1) return OUT_OF_MEMORY;
    allocations[i].begin = aligned_alloc(256, (num_bytes + 255) / 256 * 256);
    allocations[i].num_bytes = num_bytes;
    memset(allocations[i].begin, 0xff, num_bytes);
    allocated_bytes += num_bytes;
    *pointer = (unsigned long long)(uintptr_t)allocations[i].begin;
    return SUCCESS;
}

int cuMemFree(unsigned long long pointer) {
    int i;
    for (i = 0; i < MAX_ALLOCATIONS; i++)
        if (allocations[i].begin == (unsigned char *)(uintptr_t)pointer) {
            free(allocations[i].begin);
            allocated_bytes -= allocations[i].num_bytes;
            allocations[i].begin = NULL;
            return called("cuMemFree", "");
        }
    return INVALID_VALUE;
}

int cuMemHostAlloc(void **pointer, size_t num_bytes, unsigned flags) {
    *pointer = memset(malloc(num_bytes), 0xff, num_bytes);
    return called("cuMemHostAlloc", " %zu %u", num_bytes, flags);
}

int cuMemFreeHost(void *pointer) {
    free(pointer);
    return called("cuMemFreeHost", "");
}

static int on_device(const unsigned char *begin, size_t num_bytes) {
    int i;
    for (i = 0; i < MAX_ALLOCATIONS; i++)
        if (allocations[i].begin && begin >= allocations[i].begin &&
            begin + num_bytes <= allocations[i].begin + allocations[i].num_bytes)
            return 1;
    return 0;
}

static void append(Graph *graph, const Work *work) {
    Work *copy = malloc(sizeof *copy);
    *copy = *work;
    copy->next = NULL;
    if (graph->last) graph->last->next = copy;
    else graph->first = copy;
    graph->last = copy;
}

static int submit(Stream *stream, Work work) {
    if (!is_current) return INVALID_CONTEXT;
    append(stream->capturing ? stream->capturing : &stream->queue, &work);
    return SUCCESS;
}

int cuMemsetD8Async(unsigned long long pointer, unsigned char value, size_t num_bytes, Stream *stream) {
    Work work = {.target = (unsigned char *)(uintptr_t)pointer, .num_bytes = num_bytes, .value = value};
    if (!on_device(work.target, num_bytes)) return INVALID_VALUE;
    return called("cuMemsetD8Async", " %zu", num_bytes) ? INVALID_VALUE : submit(stream, work);
}

static int copy(const char *name, Stream *stream, unsigned long long to, int to_device,
                unsigned long long from, int from_device, size_t num_bytes) {
    Work work = {.target = (unsigned char *)(uintptr_t)to,
                 .source = (unsigned char *)(uintptr_t)from,
                 .num_bytes = num_bytes};
    int code = called(name, " %zu", num_bytes);
    if (code) return code;
    if (to_device != on_device(work.target, num_bytes)) return INVALID_VALUE;
    if (from_device != on_device(work.source, num_bytes)) return INVALID_VALUE;
    return submit(stream, work);
}

int cuMemcpyHtoDAsync(unsigned long long to, const void *from, size_t num_bytes, Stream *stream) {
    return copy("cuMemcpyHtoDAsync", stream, to, 1, (uintptr_t)from, 0, num_bytes);
}

int cuMemcpyDtoHAsync(void *to, unsigned long long from, size_t num_bytes, Stream *stream) {
    return copy("cuMemcpyDtoHAsync", stream, (uintptr_t)to, 0, from, 1, num_bytes);
}

int cuMemcpyDtoDAsync(unsigned long long to, unsigned long long from, size_t num_bytes, Stream *stream) {
    return copy("cuMemcpyDtoDAsync", stream, to, 1, from, 1, num_bytes);
}

int cuLaunchHostFunc(Stream *stream, void (*function)(void *), void *data) {
    Work work = {.function = function, .data = data};
    return submit(stream, work);
}

int cuStreamCreate(Stream **stream, unsigned flags) {
    *stream = calloc(1, sizeof **stream);
    return called("cuStreamCreate", " %u", flags);
}

int cuStreamSynchronize(Stream *stream) {
    Work *work;
    int code = called("cuStreamSynchronize", "");
    if (code) return code;
    if (stream->capturing) return INVALID_VALUE;
    while ((work = stream->queue.first)) {
        if (work->function) work->function(work->data);
        else if (work->source) memmove(work->target, work->source, work->num_bytes);
        else memset(work->target, work->value, work->num_bytes);
        stream->queue.first = work->next;
        free(work);
    }
    stream->queue.last = NULL;
    return SUCCESS;
}

int cuStreamDestroy(Stream *stream) {
    free(stream);
    return called("cuStreamDestroy", "");
}

int cuStreamBeginCapture(Stream *stream, int mode) {
    stream->capturing = calloc(1, sizeof *stream->capturing);
    return called("cuStreamBeginCapture", " %d", mode);
}

int cuStreamEndCapture(Stream *stream, Graph **graph) {
    *graph = stream->capturing;
    stream->capturing = NULL;
    return called("cuStreamEndCapture", "");
}

int cuGraphInstantiateWithFlags(Graph **executable, Graph *graph, unsigned long long flags) {
    Work *work;
    *executable = calloc(1, sizeof **executable);
    for (work = graph->first; work; work = work->next) append(*executable, work);
    return called("cuGraphInstantiateWithFlags", " %llu", flags);
}

int cuGraphLaunch(Graph *executable, Stream *stream) {
    Work *work;
    int code = called("cuGraphLaunch", "");
    for (work = executable->first; work && !code; work = work->next) code = submit(stream, *work);
    return code;
}

static void clear(Graph *graph) {
    Work *work;
    while ((work = graph->first)) {
        graph->first = work->next;
        free(work);
    }
    free(graph);
}

int cuGraphDestroy(Graph *graph) {
    clear(graph);
    return called("cuGraphDestroy", "");
}

int cuGraphExecDestroy(Graph *executable) {
    clear(executable);
    return called("cuGraphExecDestroy", "");
}

static const struct {
    int code;
    const char *name, *text;
} ERRORS[] = {
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
};

static int describe(int code, const char **name, const char **text) {
    size_t i;
    for (i = 0; i < sizeof ERRORS / sizeof *ERRORS; i++)
        if (ERRORS[i].code == code) {
            *name = ERRORS[i].name;
            *text = ERRORS[i].text;
            return SUCCESS;
        }
    *name = *text = NULL;
    return INVALID_VALUE;
}

int cuGetErrorName(int code, const char **name) {
    const char *text;
    return describe(code, name, &text);
}

int cuGetErrorString(int code, const char **text) {
    const char *name;
    return describe(code, &name, text);
}

#define ENTRY(name) {#name, (void *)name}
static const struct {
    const char *name;
    void *function;
} FUNCTIONS[] = {
    ENTRY(cuInit), ENTRY(cuDriverGetVersion), ENTRY(cuDeviceGet), ENTRY(cuDeviceGetAttribute),
    ENTRY(cuDevicePrimaryCtxRetain), ENTRY(cuCtxPushCurrent), ENTRY(cuCtxPopCurrent), ENTRY(cuModuleLoadData),
    ENTRY(cuModuleGetFunction), ENTRY(cuFuncLoad), ENTRY(cuFuncSetAttribute), ENTRY(cuLaunchKernelEx),
    ENTRY(cuGetErrorName), ENTRY(cuGetErrorString), ENTRY(cuCtxSetCurrent), ENTRY(cuMemGetInfo),
    ENTRY(cuMemAlloc), ENTRY(cuMemFree), ENTRY(cuMemHostAlloc), ENTRY(cuMemFreeHost), ENTRY(cuMemsetD8Async),
    ENTRY(cuMemcpyHtoDAsync), ENTRY(cuMemcpyDtoHAsync), ENTRY(cuMemcpyDtoDAsync), ENTRY(cuLaunchHostFunc),
    ENTRY(cuStreamCreate), ENTRY(cuStreamSynchronize), ENTRY(cuStreamDestroy), ENTRY(cuStreamBeginCapture),
    ENTRY(cuStreamEndCapture), ENTRY(cuGraphInstantiateWithFlags), ENTRY(cuGraphLaunch), ENTRY(cuGraphDestroy),
    ENTRY(cuGraphExecDestroy),
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
