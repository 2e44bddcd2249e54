"""A pool of K/V pages: fork without copying, copy on write, windows as table edits."""

from arcopo_kernels.paging.pool import PagePool, PagePoolExhausted, PageRun, PageTable

__all__ = ["PagePool", "PagePoolExhausted", "PageRun", "PageTable"]
