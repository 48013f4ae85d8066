"""The DIMSE wire that acceptor and requestors share.

pynetdicom negotiates, keeps the upper layer's state table (PS3.8 9.2) and encodes every message
but C-STORE. What differs: one thread per association that blocks in ``recv_into``, with limits
and absolute deadlines, in place of two that poll each millisecond and hand over through queues
(PERFORMANCE.md: 3 ms per message and two 1 kHz polls for an idle association).
"""
