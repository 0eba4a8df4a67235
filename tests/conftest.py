"""What every test shares: shape checks on, warnings as errors, property counts by profile.

`TEST_PROFILE=full` (`make test-full`) runs the counts that a release is judged by; the default is one small
instance of everything.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads under load are slower than one on small machines

from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

# Every jaxtyping shape annotation in the core is checked at run time while tests run. Before any import of the package.
install_import_hook("service.core", "beartype.beartype")

import torch  # noqa: E402

torch.set_num_threads(1)

COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("quick", max_examples=50, **COMMON)
settings.register_profile("full", max_examples=500, **COMMON)
settings.load_profile(os.environ.get("TEST_PROFILE", "quick"))
