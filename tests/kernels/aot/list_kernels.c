/* Lists the library's kernels; fails if a cubin is no ELF file that defines the declared entry point. */
#include <elf.h>
#include <stdio.h>
#include <string.h>

#include "igpo_kernels.h"

enum { CUDA_MACHINE = 190 };

/* Whether the symbol table of an ELF file in memory defines a function of this name. */
static int defines(const unsigned char *file, size_t size, const char *symbol) {
    Elf64_Ehdr header;
    if (size < sizeof header) return 0;
    memcpy(&header, file, sizeof header);
    if (memcmp(header.e_ident, ELFMAG, SELFMAG) || header.e_machine != CUDA_MACHINE) return 0;
    if (header.e_shoff + (size_t)header.e_shnum * sizeof(Elf64_Shdr) > size) return 0;
    const Elf64_Shdr *sections = (const Elf64_Shdr *)(file + header.e_shoff);
    for (int s = 0; s < header.e_shnum; s++) {
        if (sections[s].sh_type != SHT_SYMTAB) continue;
        const Elf64_Sym *symbols = (const Elf64_Sym *)(file + sections[s].sh_offset);
        const char *names = (const char *)file + sections[sections[s].sh_link].sh_offset;
        for (size_t i = 0; i < sections[s].sh_size / sizeof *symbols; i++)
            if (ELF64_ST_TYPE(symbols[i].st_info) == STT_FUNC && !strcmp(names + symbols[i].st_name, symbol)) return 1;
    }
    return 0;
}

/* Whether igpo_kernels_find gives it back, and its numbers are possible. */
static int consistent(const igpo_kernels_kernel *k) {
    const igpo_kernels_kernel *found = igpo_kernels_find(k->kernel, k->arch, k->dtype, k->shape_class);
    if (found != k || k->threads != 32 * k->num_warps || k->shared_bytes > 227 << 10) return 0;
    size_t scratch = k->parameter_count - 2;
    for (size_t i = 0; i < k->parameter_count; i++) {
        const igpo_kernels_parameter *p = &k->parameters[i];
        if (!p->size || !p->divisor || !p->tensor_map != (strcmp(p->type, "tensormap") != 0)) return 0;
        if ((i >= scratch) != (strstr(p->name, "_scratch") != NULL)) return 0;
    }
    return 1;
}

int main(void) {
    size_t wrong = 0;
    printf("libigpo_kernels %s, ABI %u\n", igpo_kernels_version(), igpo_kernels_abi());
    for (size_t i = 0; i < igpo_kernels_count(); i++) {
        const igpo_kernels_kernel *k = igpo_kernels_at(i);
        int sound = defines(k->cubin, k->cubin_size, k->symbol) && consistent(k);
        printf("%-30s %-7s %-5s %-14s %4u threads %6u B shared %2u parameters %7zu B%s\n", k->kernel, k->arch, k->dtype,
               k->shape_class, k->threads, k->shared_bytes, k->parameter_count, k->cubin_size, sound ? "" : "  WRONG");
        wrong += !sound;
    }
    printf("%zu kernels, %zu wrong\n", igpo_kernels_count(), wrong);
    return wrong || !igpo_kernels_count() || igpo_kernels_at(igpo_kernels_count());
}
