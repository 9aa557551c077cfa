"""The commands of `fastroute`, one module each."""
