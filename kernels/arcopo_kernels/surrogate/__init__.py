"""The clipped distance-softmax surrogate of AR-CoPO."""

from arcopo_kernels.surrogate.op import copo_policy, copo_surrogate
from arcopo_kernels.surrogate.reference import PolicyOutput, SurrogateOutput

__all__ = ["PolicyOutput", "SurrogateOutput", "copo_policy", "copo_surrogate"]
