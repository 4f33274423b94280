/* Sums rows of partial sums with policy_loss_finish on the first device; exit code 77 where there is none. */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "igpo_kernels.h"

enum { SKIPPED = 77, ROWS = 9, RATIO_MAX = 5, COLUMNS = 300, MAJOR = 75, MINOR = 76, MAX_DYNAMIC_SHARED = 8 };

typedef uint64_t address;
typedef void *handle;

static int skip(const char *reason) {
    printf("skipped: %s\n", reason);
    return SKIPPED;
}

static void *driver;

/* A function of the CUDA driver. */
static void *entry(const char *name) {
    void *found = dlsym(driver, name);
    if (!found) {
        printf("libcuda.so.1 has no %s\n", name);
        exit(1);
    }
    return found;
}

static void check(int status, const char *call) {
    if (!status) return;
    printf("%s: CUDA error %d\n", call, status);
    exit(1);
}

#define CUDA(name, types, ...) check(((int(*) types)entry(name))(__VA_ARGS__), name)

int main(void) {
    if (!(driver = dlopen("libcuda.so.1", RTLD_NOW))) return skip("no CUDA driver (libcuda.so.1)");
    int count = 0, device, major, minor;
    if (((int (*)(unsigned))entry("cuInit"))(0) || ((int (*)(int *))entry("cuDeviceGetCount"))(&count) || !count)
        return skip("no CUDA device");
    CUDA("cuDeviceGet", (int *, int), &device, 0);
    CUDA("cuDeviceGetAttribute", (int *, int, int), &major, MAJOR, device);
    CUDA("cuDeviceGetAttribute", (int *, int, int), &minor, MINOR, device);
    char arch[16], reason[80];
    snprintf(arch, sizeof arch, "sm_%d%d", major, minor);
    const igpo_kernels_kernel *kernel = igpo_kernels_find("policy_loss_finish", arch, "fp32", NULL);
    snprintf(reason, sizeof reason, "the library has no policy_loss_finish for this device's %s", arch);
    if (!kernel) return skip(reason);

    handle context, module, function;
    CUDA("cuDevicePrimaryCtxRetain", (handle *, int), &context, device);
    CUDA("cuCtxSetCurrent", (handle), context);
    CUDA("cuModuleLoadData", (handle *, const void *), &module, kernel->cubin);
    CUDA("cuModuleGetFunction", (handle *, handle, const char *), &function, module, kernel->symbol);
    CUDA("cuFuncSetAttribute", (handle, int, int), function, MAX_DYNAMIC_SHARED, (int)kernel->shared_bytes);

    static float partials[ROWS][COLUMNS];
    float sums[ROWS], expected[ROWS] = {0};
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < COLUMNS; c++) {
            partials[r][c] = (float)((7 * c + r) % 11); /* small integers: sums are exact */
            if (r != RATIO_MAX) expected[r] += partials[r][c];
            else if (partials[r][c] > expected[r]) expected[r] = partials[r][c];
        }
    address partial_ptr, sums_ptr, global_scratch = 0, profile_scratch = 0;
    int32_t columns = COLUMNS;
    CUDA("cuMemAlloc_v2", (address *, size_t), &partial_ptr, sizeof partials);
    CUDA("cuMemAlloc_v2", (address *, size_t), &sums_ptr, sizeof sums);
    CUDA("cuMemcpyHtoD_v2", (address, const void *, size_t), partial_ptr, partials, sizeof partials);
    void *parameters[] = {&partial_ptr, &sums_ptr, &columns, &global_scratch, &profile_scratch};
    if (kernel->parameter_count != sizeof parameters / sizeof *parameters) return 1;
    CUDA("cuLaunchKernel",
         (handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, handle, void **, void **),
         function, ROWS, 1, 1, kernel->threads, 1, 1, kernel->shared_bytes, NULL, parameters, NULL);
    CUDA("cuMemcpyDtoH_v2", (void *, address, size_t), sums, sums_ptr, sizeof sums);
    for (int r = 0; r < ROWS; r++)
        if (sums[r] != expected[r]) {
            printf("row %d: got %g, expected %g\n", r, sums[r], expected[r]);
            return 1;
        }
    printf("launched %s on %s: %d rows of %d summed\n", kernel->symbol, arch, ROWS, COLUMNS);
    return 0;
}
