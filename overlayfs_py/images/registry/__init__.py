"""Images from and to registries.

credentials  who one is to a registry: auth.json and its kin
client       requests to one repository, with authentication, retries and downloads that go on where they were cut off
transfer     pull and push
"""
