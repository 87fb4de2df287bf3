// Fills an array with one number.

namespace cuneigh::toy {

template <typename Plan>
__global__ void fill(float* x) {  // [kSize]
  if (threadIdx.x < Plan::kSize) x[threadIdx.x] = 1.0f;
}

}  // namespace cuneigh::toy
