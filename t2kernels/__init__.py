"""Singular value fine-tuning (SVF) as fast layers: y = x·V·diag(σ⊙z)·Uᵀ, z per request.

The public surface, on one page. Importing it imports torch and nothing heavier, touches no GPU
and opens no connection.
"""

from ._version import __version__ as __version__
from .bank import ExpertBank as ExpertBank
from .convert import ConversionReport as ConversionReport
from .convert import convert as convert
from .convert import revert as revert
from .convert import svf_layers as svf_layers
from .convert import trainable as trainable
from .diagonal import effective_diagonal as effective_diagonal
from .diagonal import effective_multiplier as effective_multiplier
from .diagonal import mix as mix
from .expert import Expert as Expert
from .expert import Truncation as Truncation
from .explain import Explanation as Explanation
from .explain import explain as explain
from .files import CorruptFileError as CorruptFileError
from .files import SaveError as SaveError
from .graphs import StepGraphs as StepGraphs
from .nn import SVFLinear as SVFLinear
from .ops.dispatch import BACKENDS as BACKENDS
from .ops.dispatch import backend as backend
from .ops.dispatch import batch_invariant as batch_invariant
from .ops.dispatch import is_batch_invariant as is_batch_invariant
from .ops.functional import dense as dense
from .ops.functional import svf_delta_linear as svf_delta_linear
from .ops.functional import svf_linear as svf_linear
from .quantized import FACTOR_KINDS as FACTOR_KINDS
from .quantized import QuantizedFactors as QuantizedFactors
from .quantized import dequantize as dequantize
from .quantized import quantize as quantize
from .selection import select as select
from .serving import Slots as Slots
from .store import FactorStore as FactorStore
from .store import decompose_checkpoint as decompose_checkpoint
from .svd import Accuracy as Accuracy
from .svd import SVDFactors as SVDFactors
from .svd import accuracy as accuracy
from .svd import check_factors as check_factors
from .svd import decompose as decompose
from .svd import fingerprint as fingerprint
from .svd import reconstruct as reconstruct
