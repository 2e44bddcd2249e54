"""The negative-aware forward-process loss of Astrolabe."""

from arcopo_kernels.nft.op import nft_loss
from arcopo_kernels.nft.reference import NFTOutput

__all__ = ["NFTOutput", "nft_loss"]
