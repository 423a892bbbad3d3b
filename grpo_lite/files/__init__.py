"""Safe files: written whole or not at all, summed, locked, cached, without secrets; and patience with the Hub.

Every room may use these modules; they know nothing of recipes or models.
"""
