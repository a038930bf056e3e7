//go:build linux

package main

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/openlock/openlock/internal/auth"
	"github.com/openlock/openlock/internal/device"
	"github.com/openlock/openlock/internal/store"
)

// Before the answer to an OpenLock is written, and before anything that could
// carry its command is written to the device, the command's record has been
// written to the database's log and a sync of that file has returned.
//
// This proves the system calls and their order, in the program as it is built.
// It does not prove what a disk makes of a sync when the power fails.
func TestASyncReturnsBeforeTheAnswer(t *testing.T) {
	const opens = 50
	mayTrace(t)
	data, identity := filepath.Join(t.TempDir(), "data"), filepath.Join(t.TempDir(), "lock-1")
	key := lockAndKey(t, data, identity)
	s := serveTraced(t, data)
	d := &door{t: t, config: deviceConfig(1, identity, s.mqtt), events: make(chan device.Event, 1024)}
	d.config.RelockAfter = time.Hour // it speaks of commands alone
	d.run()
	d.await(device.Connected)
	s.post(key, "/locks/1/CreateLock", `{"index": 1, "uuid": "u"}`, http.StatusCreated)
	var commands []string
	for range opens + 1 {
		command, _ := opened(s.post(key, openPath(1), nil, http.StatusOK))
		for d.await(device.Reported).CommandID != command {
		}
		commands = append(commands, command)
	}
	d.stop()
	calls := s.end()
	for _, c := range commands[1:] { // by the end of the first, what the device asks for at the start is answered
		if err := calls.check(c); err != nil {
			t.Errorf("command %q: %v", c, err)
		}
	}
	t.Logf("%d answers checked; %d syncs of the log in %d system calls", opens, calls.syncs(), len(calls.of))
}

// mayTrace skips the test where one process may not trace another.
func mayTrace(t *testing.T) {
	t.Helper()
	out, err := exec.Command("strace", "-o", os.DevNull, "true").CombinedOutput()
	if err != nil && strings.Contains(strings.ToLower(string(out)), "ptrace") {
		t.Skipf("this process may not trace another one, so system calls cannot be seen: %s", out)
	}
	if err != nil {
		t.Fatalf("strace: %v %s", err, out)
	}
}

// lockAndKey makes an organisation's key and a device's identity.
func lockAndKey(t *testing.T, data, identity string) (key string) {
	t.Helper()
	f, err := openFolder(t.Context(), data)
	if err != nil {
		t.Fatal(err)
	}
	if _, err = f.registry.CreateOrganization(t.Context(), "acme", ""); err != nil {
		t.Fatal(err)
	}
	if key, _, err = f.registry.Create(t.Context(), auth.NewCredential{Kind: store.APIKey, Org: "acme"}); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.enroll(t.Context(), 1, identity), f.db.Close()); err != nil {
		t.Fatal(err)
	}
	return key
}

// traced is the binary, serving under strace.
type traced struct {
	*program
	http, mqtt, trace string
}

func serveTraced(t *testing.T, data string) *traced {
	t.Helper()
	s := &traced{trace: filepath.Join(t.TempDir(), "trace")}
	cmd := exec.Command("strace", "-f", "-tt", "-yy", "-s", "16384", "-o", s.trace,
		"-e", "trace=fdatasync,fsync,read,recvfrom,write,pwrite64,sendto,writev",
		binary(t), "serve", "--data", data, "--http", "127.0.0.1:0", "--mqtt", "127.0.0.1:0")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // the server outlives a killed strace
	s.program = launch(t, cmd)
	t.Cleanup(func() { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) })
	s.http = s.await(s.stdout, apiLine.String())[1]
	s.mqtt = s.await(s.stdout, deviceLine.String())[1]
	return s
}

// post sends each request through a socket of its own, by which the trace names
// it.
func (s *traced) post(key, path string, body any, status int) reply {
	s.t.Helper()
	client := &http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true}}
	a, err := sendTo(client, "http://"+s.http, "POST", path, creds{key: key}, body)
	if err != nil || a.status != status {
		s.t.Fatalf("%s: status %d, %v: %s", path, a.status, err, a.raw)
	}
	return a
}

// end stops the server in good order and answers with what it called.
func (s *traced) end() syscalls {
	s.t.Helper()
	if err := syscall.Kill(-s.cmd.Process.Pid, syscall.SIGTERM); err != nil { // strace itself blocks it
		s.t.Fatal(err)
	}
	if code := s.exit(); code != 0 {
		s.t.Fatalf("exit code %d", code)
	}
	trace, err := os.ReadFile(s.trace)
	if err != nil {
		s.t.Fatal(err)
	}
	if !strings.Contains(string(trace), "<TCP:[") {
		s.t.Skip("strace cannot name sockets here (no NETLINK_SOCK_DIAG), so the device's is not known")
	}
	return syscalls{of: parseTrace(string(trace)), http: s.http, mqtt: s.mqtt}
}

// A traceCall is one line of the trace, or two: its begin and its return.
type traceCall struct {
	begin, end int // places in the trace; strace sees a call before it starts and after it has returned
	name, file string
	text       string
	result     int
}

var (
	begunCall   = regexp.MustCompile(`^(\w+)\(\d+<(TCP:\[[^\]]*\]|[^>]*)>`)
	resumedCall = regexp.MustCompile(`^<\.\.\. \w+ resumed>`)
	callResult  = regexp.MustCompile(`\) += (-?\d+)[^)"]*(\([^)]*\))?$`)
)

// parseTrace puts the calls together in the order of their return.
func parseTrace(trace string) (all []traceCall) {
	type half struct {
		at   int
		text string
	}
	unfinished := map[string]half{} // by thread
	for at, line := range strings.Split(trace, "\n") {
		thread, rest, _ := strings.Cut(line, " ")
		_, text, _ := strings.Cut(strings.TrimLeft(rest, " "), " ") // of the time
		begin := at
		if start, cut := strings.CutSuffix(text, "<unfinished ...>"); cut {
			unfinished[thread] = half{at, start}
			continue
		}
		if mark := resumedCall.FindString(text); mark != "" {
			begin, text = unfinished[thread].at, unfinished[thread].text+text[len(mark):]
		}
		call, result := begunCall.FindStringSubmatch(text), callResult.FindStringSubmatch(text)
		if call == nil || result == nil {
			continue // of no file, or without return
		}
		n, _ := strconv.Atoi(result[1])
		all = append(all, traceCall{begin: begin, end: at, name: call[1], file: call[2], text: text, result: n})
	}
	return all
}

func (c traceCall) syncs() bool {
	return (c.name == "fsync" || c.name == "fdatasync") && c.result == 0 && strings.HasSuffix(c.file, "/"+store.File+"-wal")
}

func (c traceCall) records(command string) bool {
	return c.name == "pwrite64" && c.result > 0 && strings.HasSuffix(c.file, "/"+store.File+"-wal") && strings.Contains(c.text, command)
}

func (c traceCall) socketOf(address string) bool {
	return strings.HasPrefix(c.file, "TCP:["+address+"->")
}

func (c traceCall) reads() bool { return c.name == "read" || c.name == "recvfrom" }

func (c traceCall) writes() bool {
	return c.name == "write" || c.name == "writev" || c.name == "sendto"
}

// carrierLeast is the size of a TLS 1.3 record that holds no more than a
// command's id. What is smaller is the acknowledgement of the device's last
// report, which may come after the report's own answer.
const carrierLeast = 36 + 22

type syscalls struct {
	of         []traceCall
	http, mqtt string
}

func (s syscalls) syncs() (n int) {
	for _, c := range s.of {
		if c.syncs() {
			n++
		}
	}
	return n
}

// first finds the first call that begins after a place.
func (s syscalls) first(after int, is func(traceCall) bool) (traceCall, bool) {
	for _, c := range s.of {
		if c.begin > after && is(c) {
			return c, true
		}
	}
	return traceCall{}, false
}

// check holds the order of what was called for one command: its request is
// read, its record written, the log synced; only then are the device and the
// caller written to.
func (s syscalls) check(command string) error {
	answer, ok := s.first(-1, func(c traceCall) bool {
		return c.writes() && c.socketOf(s.http) && strings.Contains(c.text, `"HTTP/1.1 200 `) && strings.Contains(c.text, command)
	})
	if !ok {
		return errors.New("its answer is not in the trace")
	}
	request, ok := s.first(-1, func(c traceCall) bool { return c.reads() && c.result > 0 && c.file == answer.file })
	if !ok || request.end > answer.begin {
		return errors.New("its request is not in the trace")
	}
	record, ok := s.first(request.end, func(c traceCall) bool { return c.records(command) })
	if !ok || record.end > answer.begin {
		return fmt.Errorf("answered before its record was written: %s", answer.text)
	}
	sync, ok := s.first(record.end, traceCall.syncs)
	if !ok || sync.end > answer.begin {
		return fmt.Errorf("answered before a sync of its record had returned: %s", answer.text)
	}
	sent, ok := s.first(request.end, func(c traceCall) bool {
		return c.writes() && c.socketOf(s.mqtt) && c.result >= carrierLeast
	})
	if !ok {
		return errors.New("nothing was ever written to the device")
	}
	if sent.begin < sync.end {
		return fmt.Errorf("%d bytes were written to the device before a sync of its record had returned", sent.result)
	}
	return nil
}

// The judge of the traces can tell a bad one.
func TestTheJudgeOfTracesConvicts(t *testing.T) {
	const (
		read   = `10 05:00:00.1 read(9<TCP:[127.0.0.1:80->127.0.0.1:5000]>, "POST /locks/1/OpenLock HTTP/1.1\r\n"..., 4096) = 120`
		record = `11 05:00:00.2 pwrite64(5</d/openlock.db-wal>, "\0\1 c-1 ", 4096, 8192) = 4096`
		begin  = `11 05:00:00.3 fdatasync(5</d/openlock.db-wal> <unfinished ...>`
		end    = `11 05:00:00.4 <... fdatasync resumed>) = 0`
		failed = `11 05:00:00.4 <... fdatasync resumed>) = -1 EIO (Input/output error)`
		other  = `11 05:00:00.3 fdatasync(6</d/openlock.db>) = 0`
		ack    = `12 05:00:00.2 write(8<TCP:[127.0.0.1:88->127.0.0.1:6000]>, "\27\3\3\0\25", 26) = 26`
		tell   = `12 05:00:00.5 write(8<TCP:[127.0.0.1:88->127.0.0.1:6000]>, "\27\3\3\1\0", 300) = 300`
		answer = `10 05:00:00.6 write(9<TCP:[127.0.0.1:80->127.0.0.1:5000]>, "HTTP/1.1 200 OK\r\n\r\n{c-1}", 300) = 300`
	)
	for _, c := range []struct {
		want  string
		lines []string
	}{
		{"", []string{read, record, ack, begin, end, tell, answer}},
		{"", []string{read, record, begin, end, answer, tell}},
		{"sync of its record", []string{read, record, tell, answer}},
		{"sync of its record", []string{read, record, other, tell, answer}},
		{"sync of its record", []string{read, record, begin, failed, tell, answer}},
		{"sync of its record", []string{read, record, begin, answer, end, tell}},
		{"sync of its record", []string{read, begin, end, record, answer, tell}},
		{"its record was written", []string{record, read, begin, end, answer, tell}},
		{"its request", []string{record, begin, end, answer, tell}},
		{"its answer", []string{read, record, begin, end, tell}},
		{"written to the device before", []string{read, record, begin, tell, end, answer}},
		{"written to the device before", []string{read, tell, record, begin, end, answer}},
		{"ever written to the device", []string{read, record, begin, end, answer}},
	} {
		s := syscalls{of: parseTrace(strings.Join(c.lines, "\n")), http: "127.0.0.1:80", mqtt: "127.0.0.1:88"}
		err := s.check("c-1")
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("want %q, got %v, of\n%s", c.want, err, strings.Join(c.lines, "\n"))
		}
	}
}
