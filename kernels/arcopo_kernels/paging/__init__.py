"""A pool of K/V pages: fork without copying, copy on write, windows as table edits, a plan for a whole group."""

from arcopo_kernels.paging.op import copy_pages
from arcopo_kernels.paging.plan import GroupPlan, plan_group
from arcopo_kernels.paging.pool import PagePool, PagePoolExhausted, PageRun, PageTable, Reservation

__all__ = ["GroupPlan", "PagePool", "PagePoolExhausted", "PageRun", "PageTable", "Reservation", "copy_pages", "plan_group"]
