// Marks a library with its sources and torch version. Python reads the mark from the file, since loading a library with other
// schemas, or built for another torch, can crash the process. One source of each library includes this.

#pragma once

__attribute__((used)) static const char fastroute_build[] =
    "fastroute_build " FASTROUTE_BUILD " torch " FASTROUTE_TORCH ";";
