from tests.threads import small_networks  # noqa: F401
