"""Safe files: written whole or not at all, checksummed, locked, cached, without secrets; and errors of the Hub.

Every room may use these modules; they know nothing of recipes or models.
"""
