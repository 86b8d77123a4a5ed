"""The photometric operations: batched functions of images, draw keys and parameters, one file per kind.

Every operation has the form `operation(images, seeds, *parameters) -> images`:
    images      float32 [B, 3, 32, 128] in RGB, whole grey levels 0–255; may be overwritten
    seeds       int64 [B]: what draws per pixel are hashed from (`draws.spread`)
    parameters  float32 [B, 1, 1, 1] each
    result      float32 [B, 3, 32, 128], finite; rounding and clamping to 0–255 is the caller's

A result depends on its own image, seed and parameters alone, bit for bit. That rules out kernels whose order of
summation follows the batch (matrix products, convolutions, float sums): filters are sums of shifted images in a fixed
order, and statistics are counts and sums of whole numbers, which float arithmetic adds exactly.
"""
