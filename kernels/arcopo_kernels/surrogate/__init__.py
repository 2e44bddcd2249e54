"""The clipped distance-softmax surrogate of AR-CoPO."""

from arcopo_kernels.surrogate.op import SurrogateOutput, copo_surrogate

__all__ = ["SurrogateOutput", "copo_surrogate"]
