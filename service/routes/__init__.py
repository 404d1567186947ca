"""The routes of the server, one module per kind of resource.

Refuses to hold logic that has nothing to do with HTTP.
"""
