// A C++ program that knows the library by find_package only.
#include <igpo_kernels.h>

#include <cstdio>
#include <cstring>

int main() {
    const igpo_kernels_kernel *first = igpo_kernels_at(0);
    if (igpo_kernels_abi() != IGPO_KERNELS_ABI || !first) return 1;
    const igpo_kernels_kernel *found =
        igpo_kernels_find(first->kernel, first->arch, first->dtype, first->shape_class);
    std::printf("%s: %zu kernels, first %s %s\n", igpo_kernels_version(), igpo_kernels_count(), first->kernel, first->arch);
    return found != first || igpo_kernels_find("no such kernel", nullptr, nullptr, nullptr);
}
