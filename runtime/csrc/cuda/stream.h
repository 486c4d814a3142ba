// The type of a CUDA stream, without the headers of CUDA.
#pragma once

struct CUstream_st;  // a cudaStream_t points to this type

namespace seg::cuda {

using Stream = ::CUstream_st*;

}  // namespace seg::cuda
