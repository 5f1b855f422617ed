# docker build -t replicate-proxy .
# docker run --rm -p 3000:3000 replicate-proxy --demo
#
# BASE may be any of Docker's python images from 3.10 on:
# docker build --build-arg BASE=python:3.13-slim -t replicate-proxy .

ARG BASE=python:3.14-alpine

FROM ${BASE} AS packages
COPY requirements.txt .
RUN python -m pip install --no-cache-dir --no-compile --target /packages -r requirements.txt \
    && rm -rf /packages/bin

FROM ${BASE}
RUN python -m pip uninstall --yes --quiet --root-user-action ignore setuptools wheel pip \
    && rm -rf "$(python -c 'import ensurepip; print(ensurepip.__path__[0])')" /usr/local/bin/pip*
WORKDIR /app
COPY --from=packages /packages /packages
COPY --chmod=444 proxy.py playground.html fake_replicate.py models.json ./
ENV PYTHONPATH=/app:/packages HOST=0.0.0.0

# One call along the whole path. If it fails, so does the build; and it leaves
# behind the bytecode of all that is imported, which nobody can write later.
RUN python -m proxy --demo --check
ENV PYTHONDONTWRITEBYTECODE=1

# For RESPONSES_DB: a volume here belongs to the user too.
RUN mkdir /data && chown 10001:10001 /data

USER 10001:10001
EXPOSE 3000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s CMD ["python", "-c", "import http.client, os; c = http.client.HTTPConnection('127.0.0.1', int(os.getenv('PORT') or 3000), timeout=4); c.request('GET', '/health'); exit(c.getresponse().status != 200)"]
ENTRYPOINT ["python", "-m", "proxy"]
