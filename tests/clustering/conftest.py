from tests.image_folders import image_folder  # noqa: F401
from tests.threads import small_networks  # noqa: F401
