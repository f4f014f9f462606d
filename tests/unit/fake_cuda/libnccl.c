/* NCCL without GPUs: communicators that know who they are, for tests of what makes them.

   Every call becomes a line of the file FAKE_CUDA_RECORD, as those of the fake driver beside it do; an id is
   recorded as a sum over its bytes. FAKE_NCCL_FAIL makes a function fail. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define ID_BYTES 128

typedef struct {
    unsigned char bytes[ID_BYTES];
} UniqueId;

static int called(const char *function, int nranks, int rank, const UniqueId *id) {
    unsigned sum = 0;
    for (int i = 0; id && i < ID_BYTES; i++) sum = 31 * sum + id->bytes[i];
    FILE *file = fopen(getenv("FAKE_CUDA_RECORD"), "a");
    fprintf(file, "%s %d %d %u\n", function, nranks, rank, sum);
    fclose(file);
    const char *failing = getenv("FAKE_NCCL_FAIL");
    return failing && strcmp(failing, function) == 0 ? 5 : 0;
}

int ncclGetUniqueId(UniqueId *id) {
    memset(id, 0, sizeof *id);
    id->bytes[1] = 255;
    id->bytes[2] = getpid() & 255;
    return called("ncclGetUniqueId", 0, 0, id);
}

int ncclCommInitRank(void **communicator, int nranks, UniqueId id, int rank) {
    *communicator = malloc(1);
    return called("ncclCommInitRank", nranks, rank, &id);
}

int ncclCommDestroy(void *communicator) {
    free(communicator);
    return called("ncclCommDestroy", 0, 0, NULL);
}

const char *ncclGetErrorString(int status) { return status == 5 ? "invalid usage" : "unknown"; }
