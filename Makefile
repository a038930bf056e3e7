# The tests use clients in other languages; .ci/deps installs what is missing.

.PHONY: build test race mutants soak lint fmt vet vuln demo ci

# One static binary without cgo, so that it runs wherever it is copied to.
build:
	CGO_ENABLED=0 go build -trimpath -o bin/openlock ./cmd/openlock

test:
	@.ci/deps test
	go test ./...

race:
	@.ci/deps race
	CGO_ENABLED=1 go test -race ./...

# Breaks copies of openlock on purpose, to see that the tests notice.
mutants:
	go test -tags mutants -count=1 -v -timeout 30m ./internal/mutants

# Simulates the cloud, its devices and their network with ever new seeds.
SOAK ?= 1h
soak:
	OPENLOCK_SOAK=$(SOAK) go test -v -run Simulation -timeout 0 ./internal/control

lint: .bin/golangci-lint
	.bin/golangci-lint run

fmt:
	gofmt -w .

vet:
	go vet ./...

# Asks vuln.go.dev for known faults of what we depend on, so it needs the net.
vuln: .bin/govulncheck
	.bin/govulncheck ./...

# A cloud and a simulated lock on this machine.
demo:
	go run ./cmd/openlock demo

ci:
	.ci/run

# The tools have a module of their own, so that what they depend on stays out of
# ours.
.bin/golangci-lint: tools/go.mod tools/go.sum
	cd tools && go build -o ../$@ github.com/golangci/golangci-lint/v2/cmd/golangci-lint

.bin/govulncheck: tools/go.mod tools/go.sum
	cd tools && go build -o ../$@ golang.org/x/vuln/cmd/govulncheck
