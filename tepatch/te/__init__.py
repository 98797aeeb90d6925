"""What a decoder layer made of Transformer Engine modules needs, once for all plugins.

``backend`` chooses between Transformer Engine and the reference; ``reference`` holds plain PyTorch modules
with Transformer Engine's constructor arguments, parameter names and semantics; ``rope`` keeps rotary
positions exact. Importing this package imports neither torch nor Transformer Engine.
"""

from __future__ import annotations

from tepatch.te.backend import BackendName, Modules, TeStatus, judge, modules, probe, resolve, use_backend

__all__ = ["BackendName", "Modules", "TeStatus", "judge", "modules", "probe", "resolve", "use_backend"]
