// Programmatic dependent launch, where the architecture has it (sm_90 on) and the launch asks for it
// (loader.launch): a grid begins while the one before it on the stream still ends. Nothing that an earlier grid writes
// may be read, and nothing that it reads or writes may be written, before wait_for_earlier_grids().
#pragma once

// The grid after this one may begin as soon as every CTA of this one has said so, and there is room.
__device__ __forceinline__ void let_next_grid_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Until all earlier grids have ended, their writes visible. It does nothing if they had to end before this one began.
__device__ __forceinline__ void wait_for_earlier_grids() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
