"""The CPU implementations by numba kernels, imported on the first call: compiled on first use, cached on disk.

* Scan and convolution run on vectors of BLOCK neighbouring channels, without sums across them, and with polynomials
  instead of calls to a maths library. Other loops over channels are vectorised by the compiler.
* Innermost loops call no function with an array as an argument: numba would count references there, atomically.
* The state (N, BLOCK) stays in the L1 cache, and what a step adds to y in registers. The rows of later tokens are
  prefetched explicitly, since they lie too far apart in memory for the hardware prefetcher.
* One thread runs all directions of an image and a block of channels: there are no races, and the result of an image
  depends neither on the rest of the batch nor on the number of threads.
"""
