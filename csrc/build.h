// What a library was built from and for. Python reads it from the file, since loading a library of other schemas, or one
// built for another torch, can end the process. One source of each library includes this.

#pragma once

__attribute__((used)) static const char fastroute_build[] =
    "fastroute_build " FASTROUTE_BUILD " torch " FASTROUTE_TORCH ";";
