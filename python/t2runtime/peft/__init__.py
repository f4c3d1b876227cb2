"""SVF as a method of the PEFT library: importing this module registers it.

    import t2runtime.peft as svf  # before any SVF adapter is made or loaded
    from peft import get_peft_model

    model = get_peft_model(base, svf.SVFConfig(task_type="CAUSAL_LM"))  # all linear layers
    model.save_pretrained("adapter")  # adapter_config.json, z in adapter_model.safetensors

From there on everything is PEFT's: from_pretrained, AutoPeftModel, load_adapter (also that of
transformers), set_adapter, disable_adapter, adapter_names=[..., "__base__"] per row,
add_weighted_adapter, merge_and_unload, and the trainers of TRL. A program that loads an SVF adapter
without this import gets ``KeyError: 'SVF'`` from PEFT.

    config.py   SVFConfig; `loading`: what to say when an adapter is loaded
    layer.py    the tuner layer: one factorisation, one z per adapter
    rows.py     which row of a batch uses which adapter
    model.py    the tuner: targets, base check, mixing, routing
    experts.py  adapter -> t2kernels.Expert and back
"""

from .version import check_version

check_version()  # before anything below touches the library

from .config import SVFConfig as SVFConfig  # noqa: E402
from .config import loading as loading  # noqa: E402
from .experts import from_expert as from_expert  # noqa: E402
from .experts import to_expert as to_expert  # noqa: E402
from .experts import tuner_layers as tuner_layers  # noqa: E402
from .layer import SVFTunerLinear as SVFTunerLinear  # noqa: E402
from .model import SVFModel as SVFModel  # noqa: E402
from .model import register as _register  # noqa: E402
from .version import TESTED as TESTED  # noqa: E402

_register()
