// What runs on the host and on the device alike.
#pragma once

#ifdef __CUDACC__
#define MHMATMUL_HOST_DEVICE __host__ __device__
#else
#define MHMATMUL_HOST_DEVICE
#endif
