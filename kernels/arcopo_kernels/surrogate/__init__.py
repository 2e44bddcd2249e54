"""The clipped distance-softmax surrogate of AR-CoPO."""

from arcopo_kernels.surrogate.op import copo_surrogate
from arcopo_kernels.surrogate.reference import SurrogateOutput

__all__ = ["SurrogateOutput", "copo_surrogate"]
