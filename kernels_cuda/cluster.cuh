// Clusters of PARTS CTAs along y that go together (sm_90 on); elsewhere PARTS is 1.
#pragma once

#if PARTS > 1
#define IN_CLUSTERS __cluster_dims__(1, PARTS, 1)
#else
#define IN_CLUSTERS
#endif

// The largest over the cluster of `mine`, an int in shared memory that any thread of each CTA may have raised before.
// To be followed by leave_cluster().
__device__ __forceinline__ int largest_of_cluster(int* mine) {
#if PARTS > 1
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(mine));
    int largest = 0;
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        int other;
        asm volatile("{\n.reg .u32 there;\nmapa.shared::cluster.u32 there, %1, %2;\n"
                     "ld.shared::cluster.s32 %0, [there];\n}"
                     : "=r"(other)
                     : "r"(address), "r"(part)
                     : "memory");
        largest = max(largest, other);
    }
    // Not relaxed: the reads must be over, or a CTA that ends takes what is being read with it.
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    return largest;
#else
    __syncthreads();
    return *mine;
#endif
}

// No CTA may end, and give its shared memory away, before all have read it.
__device__ __forceinline__ void leave_cluster() {
#if PARTS > 1
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
