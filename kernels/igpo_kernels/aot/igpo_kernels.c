#include "table.h"

#include <string.h>

uint32_t igpo_kernels_abi(void) { return IGPO_KERNELS_ABI; }

const char *igpo_kernels_version(void) { return IGPO_KERNELS_VERSION " " IGPO_KERNELS_SOURCES " " IGPO_KERNELS_TRITON; }

const char *igpo_kernels_manifest(void) { return igpo_kernels_manifest_text; }

size_t igpo_kernels_count(void) { return igpo_kernels_table_size; }

const igpo_kernels_kernel *igpo_kernels_at(size_t index) {
    return index < igpo_kernels_table_size ? &igpo_kernels_table[index] : NULL;
}

const unsigned char *igpo_kernels_cubin(size_t index, size_t *size) {
    const igpo_kernels_kernel *kernel = igpo_kernels_at(index);
    *size = kernel ? kernel->cubin_size : 0;
    return kernel ? kernel->cubin : NULL;
}

static int fits(const char *wanted, const char *got) { return !wanted || !strcmp(wanted, got); }

const igpo_kernels_kernel *igpo_kernels_find(const char *kernel, const char *arch, const char *dtype,
                                             const char *shape_class) {
    for (size_t i = 0; i < igpo_kernels_table_size; i++) {
        const igpo_kernels_kernel *k = &igpo_kernels_table[i];
        if (fits(kernel, k->kernel) && fits(arch, k->arch) && fits(dtype, k->dtype) &&
            fits(shape_class, k->shape_class))
            return k;
    }
    return NULL;
}
