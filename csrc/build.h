// Marks a library with its sources, its torch version and, if it has CUDA kernels, the architectures that they are compiled for.
// Python reads the mark from the file, since loading a library with other schemas, or built for another torch, can crash the
// process. One source of each library includes this.

#pragma once

#ifdef FASTROUTE_ARCHITECTURES
#define FASTROUTE_MARK FASTROUTE_TORCH " for " FASTROUTE_ARCHITECTURES
#else
#define FASTROUTE_MARK FASTROUTE_TORCH
#endif

__attribute__((used)) static const char fastroute_build[] =
    "fastroute_build " FASTROUTE_BUILD " torch " FASTROUTE_MARK ";";
