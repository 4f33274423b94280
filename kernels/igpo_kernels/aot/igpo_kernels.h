/* The Triton kernels of igpo_kernels, compiled ahead of time; README.md says how they are launched.
 *
 * Everything returned is constant data of the library: never freed, valid until it is unloaded, safe from any thread.
 */
#ifndef IGPO_KERNELS_H
#define IGPO_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define IGPO_KERNELS_API __attribute__((visibility("default")))
#else
#define IGPO_KERNELS_API
#endif

/* Changes whenever a structure or a function below does: compare it with igpo_kernels_abi(). */
#define IGPO_KERNELS_ABI 1

/* What cuTensorMapEncodeTiled needs beside address, sizes and strides: element strides are 1, interleave and
 * out-of-bounds fill NONE, L2 promotion 128 bytes. */
typedef struct {
    uint32_t rank;
    uint32_t box[5]; /* elements, innermost dimension first */
    uint32_t element_bytes;
    uint32_t data_type; /* CUtensorMapDataType */
    uint32_t swizzle;   /* CUtensorMapSwizzle */
} igpo_kernels_tensor_map;

/* One parameter of cuLaunchKernel. */
typedef struct {
    const char *name; /* the Triton argument; a descriptor's parts are called x, x.shape[0], x.stride[0], ... */
    const char *type; /* *bf16 (an address), i32, i64, fp32, ..., tensormap */
    uint32_t size;    /* bytes */
    uint32_t divisor; /* the address or integer must be a multiple of this */
    const igpo_kernels_tensor_map *tensor_map; /* of a tensormap, else NULL */
} igpo_kernels_parameter;

typedef struct {
    const char *op;          /* linear_logprob */
    const char *kernel;      /* linear_logprob_forward */
    const char *arch;        /* sm_90 */
    const char *dtype;       /* bf16 */
    const char *shape_class; /* large/entropy */
    const char *symbol;      /* entry point in the cubin */
    const char *constexprs;  /* BLOCK_ROWS=128 CAPPED=0 bias_ptr=None: what is compiled in, in order of name */
    uint32_t num_warps;
    uint32_t threads;      /* a block: (threads, 1, 1) */
    uint32_t shared_bytes; /* dynamic shared memory */
    uint32_t parameter_count;
    const igpo_kernels_parameter *parameters; /* in order; the last two are scratch memory: pass null pointers */
    const unsigned char *cubin;
    size_t cubin_size;
} igpo_kernels_kernel;

IGPO_KERNELS_API uint32_t igpo_kernels_abi(void);

/* The package's version, then the hash of the kernels' sources, then Triton's version: "0.1.0 3f2c... 3.7.1". */
IGPO_KERNELS_API const char *igpo_kernels_version(void);

IGPO_KERNELS_API size_t igpo_kernels_count(void);

/* NULL if index is not below igpo_kernels_count(). */
IGPO_KERNELS_API const igpo_kernels_kernel *igpo_kernels_at(size_t index);

/* The first kernel whose fields equal the arguments that are not NULL; NULL if there is none. */
IGPO_KERNELS_API const igpo_kernels_kernel *igpo_kernels_find(const char *kernel, const char *arch, const char *dtype,
                                                              const char *shape_class);

/* What the Python loader reads: JSON, a kernel's index there is its index here. */
IGPO_KERNELS_API const char *igpo_kernels_manifest(void);

/* The cubin of a kernel and its size; NULL if there is no such index. */
IGPO_KERNELS_API const unsigned char *igpo_kernels_cubin(size_t index, size_t *size);

#ifdef __cplusplus
}
#endif

#endif
