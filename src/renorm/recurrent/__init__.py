"""Recurrent layers whose time steps are normalized, each by its own batch, with one set of running statistics."""

from .layers import BatchRenormGRU, BatchRenormLSTM

__all__ = ["BatchRenormGRU", "BatchRenormLSTM"]
