# nats-server alone on an empty image, for machines that reach no registry; same entry point as the official image.
# scripts/build-images.sh puts the static binary beside this file.
FROM scratch
COPY nats-server /nats-server
COPY data /data
EXPOSE 4222
ENTRYPOINT ["/nats-server"]
