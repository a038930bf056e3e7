//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/openlock/openlock/internal/contract/contracttest"
	"github.com/openlock/openlock/internal/device"
	"github.com/openlock/openlock/internal/lock"
	"github.com/openlock/openlock/internal/store"
	"golang.org/x/sys/unix"
)

// tool runs the program in this process, as far as it has to end by itself.
func tool(t *testing.T, args ...string) (stdout string, err error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var out, errOut bytes.Buffer
	err = run(ctx, append([]string{"openlock"}, args...), &out, &errOut)
	if errOut.Len() > 0 {
		t.Errorf("openlock %s wrote to stderr: %s", strings.Join(args, " "), &errOut)
	}
	return out.String(), err
}

// does is tool when all should go well.
func does(t *testing.T, args ...string) (stdout string) {
	t.Helper()
	stdout, err := tool(t, args...)
	if err != nil {
		t.Fatalf("openlock %s: %v", strings.Join(args, " "), err)
	}
	return stdout
}

// made is a credential as its maker sees it.
func made(t *testing.T, stdout string) (id, secret string) {
	t.Helper()
	m := regexp.MustCompile(`^id +(\S+)\n(?s:.*)\n(ol[ks]_[a-z0-9]{40,})\n$`).FindStringSubmatch(stdout)
	if m == nil {
		t.Fatalf("no id first and no secret alone on the last line: %s", stdout)
	}
	return m[1], m[2]
}

// row is the line of a list that begins with an id, in columns.
func row(t *testing.T, list, id string) []string {
	t.Helper()
	for line := range strings.Lines(list) {
		if cells := regexp.MustCompile(`\s{2,}`).Split(strings.TrimSpace(line), -1); cells[0] == id {
			return cells
		}
	}
	t.Fatalf("%s is not listed:\n%s", id, list)
	return nil
}

func TestOrganizationsAreMadeWithATool(t *testing.T) {
	data := filepath.Join(t.TempDir(), "data")
	if out := does(t, "org", "create", "--data", data, "--name", "Acme Doors", "acme"); out != "acme\n" {
		t.Errorf("org create prints %q", out)
	}
	does(t, "org", "create", "beta", "--data", data) // flags may come last
	list := does(t, "org", "list", "--data", data)
	if cells := row(t, list, "acme"); cells[1] != "Acme Doors" {
		t.Errorf("listed as %q", cells)
	}
	row(t, list, "beta")
}

func TestCredentialsAreMadeListedRotatedAndRevokedWithATool(t *testing.T) {
	for kind, prefix := range map[string]string{"key": "olk_", "client": "ols_"} {
		t.Run(kind, func(t *testing.T) {
			data := filepath.Join(t.TempDir(), "data")
			does(t, "org", "create", "--data", data, "acme")
			of := func(verb string, more ...string) []string {
				return append([]string{kind, verb, "--data", data, "--org", "acme"}, more...)
			}
			first, secret := made(t, does(t, of("create", "--name", "front desk", "--scope", "locks:open")...))
			next, nextSecret := made(t, does(t, of("rotate", "--overlap", "1h", first)...))
			does(t, of("revoke", next)...)
			list := does(t, of("list")...)

			for _, s := range []string{secret, nextSecret} {
				if !strings.HasPrefix(s, prefix) {
					t.Errorf("the secret does not begin with %s", prefix)
				}
				if strings.Contains(list, s) {
					t.Error("a secret is listed")
				}
				keptNowhere(t, data, s)
			}
			if first == next || secret == nextSecret {
				t.Error("the successor is the old one")
			}
			// ID NAME SCOPES CREATED EXPIRES REVOKED LAST-USED
			if c := row(t, list, first); c[1] != "front desk" || c[2] != "locks:open" || c[4] == "-" || c[5] != "-" {
				t.Errorf("rotated, but listed as %q", c)
			}
			if c := row(t, list, next); c[1] != "front desk" || c[2] != "locks:open" || c[4] != "-" || c[5] == "-" {
				t.Errorf("revoked, but listed as %q", c)
			}
		})
	}
}

// keptNowhere looks into every file of a folder.
func keptNowhere(t *testing.T, folder, secret string) {
	t.Helper()
	files := 0
	err := filepath.WalkDir(folder, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		files++
		content, err := os.ReadFile(path)
		if bytes.Contains(content, []byte(secret)) {
			t.Errorf("the secret is in %s", path)
		}
		return err
	})
	if err != nil || files == 0 {
		t.Errorf("%d files read: %v", files, err)
	}
}

// What a tool changes, a server that runs on the same folder knows at its next
// request.
func TestToolsAreFeltByARunningServerAtOnce(t *testing.T) {
	r := newRig(t)
	at := func(args ...string) string { t.Helper(); return does(t, append(args, "--data", r.path)...) }
	list := func(c creds, status int) { t.Helper(); r.want(r.send("GET", "/locks/5/details", c, nil), status) }

	at("org", "create", "acme")
	id, secret := made(t, at("key", "create", "--org", "acme"))
	key := creds{key: secret}
	r.createLock(5, key)
	list(key, http.StatusOK)
	id, secret = made(t, at("key", "rotate", "--org", "acme", "--overlap", "0s", id))
	list(key, http.StatusUnauthorized)
	key = creds{key: secret}
	list(key, http.StatusOK)

	user := uuid.NewString()
	both := creds{key: secret, token: strings.TrimSpace(at("token", "user", user))}
	list(both, http.StatusOK)
	at("user", "suspend", user)
	list(both, http.StatusUnauthorized)
	at("user", "reactivate", user)
	list(both, http.StatusOK)
	at("token", "revoke", jti(t, both.token))
	list(both, http.StatusUnauthorized)
	list(key, http.StatusOK)

	client, clientSecret := made(t, at("client", "create", "--org", "acme"))
	service := creds{token: grant(t, r, client, clientSecret)}
	list(service, http.StatusOK)
	at("client", "revoke", "--org", "acme", client)
	list(service, http.StatusUnauthorized)

	at("key", "revoke", "--org", "acme", id)
	list(key, http.StatusUnauthorized)

	super, secret := made(t, at("key", "create", "--super"))
	list(creds{key: secret}, http.StatusOK)
	row(t, at("key", "list"), super)
	at("key", "revoke", super)
	list(creds{key: secret}, http.StatusUnauthorized)
}

// jti is the id of a token.
func jti(t *testing.T, token string) string {
	t.Helper()
	var claims struct{ JTI string }
	raw, err := base64.RawURLEncoding.DecodeString(strings.Split(token, ".")[1])
	if err := errors.Join(err, json.Unmarshal(raw, &claims)); err != nil {
		t.Fatal(err)
	}
	return claims.JTI
}

// grant is a client's access token.
func grant(t *testing.T, r *rig, client, secret string) string {
	t.Helper()
	form := url.Values{"grant_type": {"client_credentials"}, "client_id": {client}, "client_secret": {secret}}
	a := r.want(r.send("POST", "/oauth/token", creds{}, form.Encode(), "Content-Type", "application/x-www-form-urlencoded"), http.StatusOK)
	return a.get("access_token").(string)
}

func TestADeviceIsEnrolledOnce(t *testing.T) {
	data := filepath.Join(t.TempDir(), "data")
	if out := does(t, "device", "enroll", "--data", data, "5"); !strings.Contains(out, "lock-5") {
		t.Errorf("device enroll prints %q", out)
	}
	key := filepath.Join(data, "devices", "lock-5", "device.key")
	before, err := os.ReadFile(key)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tool(t, "device", "enroll", "--data", data, "5"); err == nil || !strings.Contains(err.Error(), "already holds device.key: choose another folder") {
		t.Errorf("the second time: %v", err)
	}
	if after, err := os.ReadFile(key); err != nil || !bytes.Equal(before, after) {
		t.Errorf("the key has changed: %v", err)
	}
	if info, err := os.Stat(key); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the key's mode is %v: %v", info.Mode(), err)
	}
	elsewhere := t.TempDir()
	does(t, "device", "enroll", "--data", data, "--dir", elsewhere, "5")
	if _, err := os.Stat(filepath.Join(elsewhere, "device.crt")); err != nil {
		t.Error(err)
	}
}

// What is wrong is said in one line on stderr, and the exit code is 1.
func TestWrongArguments(t *testing.T) {
	data := filepath.Join(t.TempDir(), "data")
	does(t, "org", "create", "--data", data, "acme")
	id, _ := made(t, does(t, "key", "create", "--data", data, "--org", "acme"))
	does(t, "key", "revoke", "--data", data, "--org", "acme", id)
	for args, want := range map[string]string{
		"nonsense":                                 "unknown argument \"nonsense\"; see `openlock --help`",
		"org nonsense":                             "unknown argument \"nonsense\"; see `openlock org --help`",
		"serve " + data:                            "unknown argument",
		"serve --nonsense":                         "-nonsense; see `openlock serve --help`",
		"serve --tls-cert x":                       "--tls-cert and --tls-key go together",
		"serve --tls-cert x --tls-key x":           "read --tls-cert and --tls-key",
		"serve --http nonsense":                    "listen on nonsense (--http)",
		"serve --public-url nonsense":              "use this server's public address",
		"serve --issuer nonsense":                  "--issuer: ",
		"demo extra":                               "unknown argument",
		"org create":                               "give one organization id",
		"org create a b":                           "give one organization id",
		"org create Acme":                          "an organization id is 1 to 63 of a-z 0-9",
		"org create operator":                      "is reserved",
		"org create acme":                          "exists already",
		"org create beta --name":                   "flag needs an argument: --name",
		"key create":                               "give --org",
		"key create --org acme --super":            "not both",
		"key create --org nobody":                  "there is no organization with this id",
		"key create --org acme --scope fly":        "there are [locks:open",
		"key create --org acme --expires=-1h":      "must lie in the future",
		"key create --org acme --expires x":        "invalid duration",
		"key create --org acme extra":              "unknown argument \"extra\"",
		"key list --org nobody":                    "there is no organization with this id",
		"key rotate --org acme":                    "give one id",
		"key rotate --org acme nobody":             "there is no such credential",
		"key rotate --org acme " + id:              "is revoked or expired; create a new one",
		"key revoke --org acme nobody":             "there is no such credential",
		"key revoke " + id:                         "there is no such credential in this organization",
		"client create":                            "\"org\" not set",
		"client list":                              "\"org\" not set",
		"token user":                               "give one user",
		"token user bob":                           "not a lower-case UUID",
		"token user --ttl=-1h " + uuid.NewString(): "--ttl is -1h0m0s",
		"token revoke":                             "give one jti",
		"user suspend":                             "give one user",
		"user suspend bob":                         "lower-case UUID",
		"device enroll":                            "give one lock id",
		"device enroll 05":                         "a lock id is a decimal integer",
		"device run 6":                             "openlock device enroll 6",
	} {
		t.Run(args, func(t *testing.T) {
			cmd := exec.Command(binary(t), strings.Fields(args)...)
			cmd.Env = append(os.Environ(), "OPENLOCK_DATA="+data, "OPENLOCK_HTTP=127.0.0.1:0", "OPENLOCK_MQTT=127.0.0.1:0")
			p := launch(t, cmd)
			if code := p.exit(); code != 1 {
				t.Errorf("exit code %d", code)
			}
			said := p.stderr.String()
			if !strings.HasPrefix(said, "openlock: ") || !strings.Contains(said, want) || strings.Count(said, "\n") != 1 || p.stdout.String() != "" {
				t.Errorf("want one line with %q", want)
			}
		})
	}
}

// serving is the built binary's server.
type serving struct {
	*program
	api, mqtt string
	client    *http.Client
}

// serveOn starts a server on a data folder, on free ports or where more flags
// say, and waits for what it announces.
func serveOn(t *testing.T, data string, more ...string) *serving {
	t.Helper()
	return announced(t, exec.Command(binary(t), serveFlags(data, more...)...))
}

func serveFlags(data string, more ...string) []string {
	return append([]string{"serve", "--data", data, "--http", "127.0.0.1:0", "--mqtt", "127.0.0.1:0"}, more...)
}

func announced(t *testing.T, cmd *exec.Cmd) *serving {
	t.Helper()
	s := &serving{program: launch(t, cmd)}
	m := s.await(s.stdout, `  API      (\S+)\n  devices  mqtts://(\S+) .*\n`)
	s.api, s.mqtt = m[1], m[2]
	s.client = &http.Client{Transport: contracttest.New(t).Transport(&http.Transport{}), Timeout: patience}
	return s
}

func (s *serving) send(method, path string, c creds, body any, headers ...string) reply {
	s.t.Helper()
	a, err := sendTo(s.client, s.api, method, path, c, body, headers...)
	if err != nil {
		s.t.Fatalf("%s %s: %v", method, path, err)
	}
	return a
}

func (s *serving) want(a reply, status int) reply {
	s.t.Helper()
	return (&rig{t: s.t}).want(a, status)
}

// acme makes an organization's key in a data folder.
func acme(t *testing.T, data string) creds {
	t.Helper()
	does(t, "org", "create", "--data", data, "acme")
	_, secret := made(t, does(t, "key", "create", "--data", data, "--org", "acme"))
	return creds{key: secret}
}

// door makes a lock and a device that is connected to the server.
func (s *serving) door(t *testing.T, id lock.ID, data string, c creds, change ...func(*device.Config)) *door {
	t.Helper()
	s.want(s.send("POST", "/locks/"+id.String()+"/CreateLock", c, map[string]any{"index": id, "uuid": uuid.NewString()}), http.StatusCreated)
	dir := t.TempDir()
	does(t, "device", "enroll", "--data", data, "--dir", dir, id.String())
	d := &door{t: t, config: deviceConfig(id, dir, s.mqtt), events: make(chan device.Event, 1024)}
	for _, f := range change {
		f(&d.config)
	}
	d.run()
	d.await(device.Connected)
	return d
}

// failsToStart runs serve, which must end with code 1 and say why.
func failsToStart(t *testing.T, cmd *exec.Cmd, why ...string) {
	t.Helper()
	p := launch(t, cmd)
	if code := p.exit(); code != 1 {
		t.Errorf("exit code %d", code)
	}
	for _, w := range why {
		if !strings.Contains(p.stderr.String(), w) {
			t.Errorf("%q is not said", w)
		}
	}
	if strings.Contains(p.stdout.String(), "API") {
		t.Error("it announces an API that it does not serve")
	}
}

func TestServeAnnouncesWhatItDoesAndWhatIsMissing(t *testing.T) {
	dir := t.TempDir()
	in := func(args ...string) *exec.Cmd {
		cmd := exec.Command(binary(t), args...)
		cmd.Dir = dir
		return cmd
	}
	s := announced(t, in(serveFlags("data")...))
	there, err := filepath.EvalSymlinks(dir)
	if err != nil {
		t.Fatal(err)
	}
	s.await(s.stdout, `\n  data     `+regexp.QuoteMeta(filepath.Join(there, "data"))+`\n`)
	s.await(s.stdout, `\n  missing  TLS for the API: give --tls-cert and --tls-key`)
	how := s.await(s.stdout, `missing  an organization: openlock (.*)\n +and its API key: +openlock (.*)\n`)
	for _, args := range how[1:] { // what it asks for can be typed as it stands
		if code := launch(t, in(strings.Fields(args)...)).exit(); code != 0 {
			t.Errorf("openlock %s: exit code %d", args, code)
		}
	}
	s.want(s.send("GET", "/health", creds{}, nil), http.StatusOK)
	s.signal(syscall.SIGTERM)
	if code := s.exit(); code != 0 {
		t.Errorf("exit code %d", code)
	}

	pki := filepath.Join("data", "pki")
	s = announced(t, in(serveFlags("data", "--tls-cert", filepath.Join(pki, "server.crt"), "--tls-key", filepath.Join(pki, "server.key"))...))
	if !strings.HasPrefix(s.api, "https://") {
		t.Errorf("with TLS, the API is on %s", s.api)
	}
	s.signal(syscall.SIGINT)
	if code := s.exit(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	for _, what := range []string{"an organization", "TLS"} {
		if strings.Contains(s.stdout.String(), "missing  "+what) {
			t.Errorf("%s is said to be missing", what)
		}
	}
}

// A signal may come at once.
func TestServeEndedWhileItAnnounces(t *testing.T) {
	data := filepath.Join(t.TempDir(), "data")
	ctx, end := context.WithCancel(t.Context())
	log := &logBuffer{}
	if err := run(ctx, append([]string{"openlock"}, serveFlags(data)...), firstWrite{end}, log); err != nil {
		t.Error(err)
	}
	if !strings.Contains(log.String(), "stopping: requests under way are answered first") {
		t.Errorf("it did not end in good order:\n%s", log)
	}
}

func TestServeOnAPortInUse(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = taken.Close() }()
	for _, flag := range []string{"--http", "--mqtt"} {
		t.Run(flag, func(t *testing.T) {
			failsToStart(t, exec.Command(binary(t), serveFlags(filepath.Join(t.TempDir(), "data"), flag, taken.Addr().String())...),
				taken.Addr().String()+" is in use", "choose another address with "+flag)
		})
	}
}

func TestServeTwiceOnOneFolder(t *testing.T) {
	data := filepath.Join(t.TempDir(), "data")
	s := serveOn(t, data)
	failsToStart(t, exec.Command(binary(t), serveFlags(data)...), "another openlock is serving from this folder: "+data, "choose another folder with --data")
	s.want(s.send("GET", "/health", creds{}, nil), http.StatusOK)
	s.signal(syscall.SIGKILL) // leaves no lock behind
	s.exit()
	serveOn(t, data)
}

func TestServeWhereItCannotWrite(t *testing.T) {
	t.Run("under a file", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(file, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		failsToStart(t, exec.Command(binary(t), serveFlags(filepath.Join(file, "data"))...), "make the data folder", "not a directory", "--data")
	})
	t.Run("read only", func(t *testing.T) {
		data := t.TempDir()
		for dir, mode := range map[string]fs.FileMode{filepath.Dir(data): 0o755, data: 0o555} {
			if err := os.Chmod(dir, mode); err != nil {
				t.Fatal(err)
			}
		}
		cmd := exec.Command(binary(t), serveFlags(data)...)
		if os.Geteuid() == 0 { // root may write everywhere
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
		}
		failsToStart(t, cmd, data+" cannot be written to (permission denied)", "--data")
	})
}

// nobody is a user without rights.
const nobody = 65534

// Invariants 4 and 5 on a full disk: no door opens that is not recorded, the
// process ends and says what to do, and goes on where it was when there is room.
func TestAFullDisk(t *testing.T) {
	disk := smallDisk(t)
	data := filepath.Join(disk, "data")
	full := data + " cannot be written to (no space left on device)"
	free := fill(t, disk)
	failsToStart(t, exec.Command(binary(t), serveFlags(data)...), full)
	free()

	key := acme(t, data)
	s := serveOn(t, data)
	d := s.door(t, 5, data, key, func(c *device.Config) { c.RelockAfter = time.Hour }) // it reports nothing else
	before := s.want(s.send("POST", openPath(5), key, nil, "Prefer", "wait=20"), http.StatusOK)
	if e := d.await(device.Opened); e.CommandID != before.get("command", "id") {
		t.Errorf("opened for %s", e.CommandID)
	}
	d.await(device.Reported)
	free = fill(t, disk)
	a := s.want(s.send("POST", openPath(5), key, nil), http.StatusBadGateway)
	if a.get("reason") != "not_sent" || !strings.Contains(fmt.Sprint(a.get("message")), "could not be recorded") {
		t.Errorf("answer %s", a.raw)
	}
	if code := s.exit(); code != 1 {
		t.Errorf("exit code %d", code)
	}
	s.await(s.stderr, `\nopenlock: .*free or repair the disk and start openlock again.*disk is full`)

	free()
	free = fill(t, disk) // what the process has given back, too
	failsToStart(t, exec.Command(binary(t), serveFlags(data)...), full)

	free()
	s = serveOn(t, data, "--http", strings.TrimPrefix(s.api, "http://"), "--mqtt", s.mqtt)
	d.await(device.Connected)
	again := s.want(s.send("POST", openPath(5), key, nil, "Prefer", "wait=20"), http.StatusOK)
	if e := d.await(device.Opened); e.CommandID != again.get("command", "id") {
		t.Errorf("opened for %s after the restart", e.CommandID)
	}
	// The outcome of the one and the request of the other: of what was refused
	// between them there is no trace.
	if n := again.get("version").(float64) - before.get("version").(float64); n != 2 {
		t.Errorf("%v events were recorded from one open to the next", n)
	}
}

// smallDisk is a file system of a few megabytes.
func smallDisk(t *testing.T) (path string) {
	t.Helper()
	path = t.TempDir()
	if err := unix.Mount("tmpfs", path, "tmpfs", 0, "size=8m,mode=0755"); err != nil {
		t.Skipf("a disk can only be filled where one may be mounted, as root: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return path
}

// fill takes all the room on a disk until it is given back.
func fill(t *testing.T, disk string) (free func()) {
	t.Helper()
	f, err := os.Create(filepath.Join(disk, "filler"))
	if err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = f.Write(make([]byte, 4096))
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	return func() {
		t.Helper()
		if err := errors.Join(f.Close(), os.Remove(f.Name())); err != nil {
			t.Fatal(err)
		}
	}
}

// With few descriptors the server says so at its start. When they run out, the
// device and the client that are there already are still served, and when they
// are back, so are new ones.
func TestDescriptorsRunOut(t *testing.T) {
	const limit = 64
	data := filepath.Join(t.TempDir(), "data")
	key := acme(t, data)
	cmd := exec.Command("sh", append([]string{"-c", fmt.Sprintf(`ulimit -n %d; exec "$0" "$@"`, limit), binary(t)}, serveFlags(data)...)...)
	s := announced(t, cmd)
	s.await(s.stdout, fmt.Sprintf(`\n  missing  open files: only %d are allowed.*ulimit -n`, limit))
	if n := held(t, s.cmd.Process.Pid, store.File); n < 7 {
		t.Errorf("%d descriptors of the database are held from the start, not one for the writer and each of six readers", n)
	}
	d := s.door(t, 5, data, key)
	opens := func() {
		t.Helper()
		a := s.want(s.send("POST", openPath(5), key, nil), http.StatusOK)
		if e := d.await(device.Opened); e.CommandID != a.get("command", "id") {
			t.Errorf("opened for %s", e.CommandID)
		}
	}
	opens()
	var conns []io.Closer
	for _, address := range []string{s.mqtt, strings.TrimPrefix(s.api, "http://")} {
		for range limit { // more than there are: the rest waits to be accepted
			c, err := net.Dial("tcp", address)
			if err != nil {
				t.Fatal(err)
			}
			conns = append(conns, c)
		}
	}
	s.await(s.stderr, `no file descriptor is free for another device`)
	s.await(s.stderr, `http: Accept error: .*too many open files`)
	opens() // on the connection that was there
	for _, c := range conns {
		_ = c.Close()
	}
	s.client.CloseIdleConnections()
	opens()
	d.stop()
	d.run()
	d.await(device.Connected)
	opens()
}

// held counts the descriptors that a process holds of a file.
func held(t *testing.T, pid int, name string) (n int) {
	t.Helper()
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil || len(fds) == 0 {
		t.Fatalf("no descriptors of process %d: %v", pid, err)
	}
	for _, fd := range fds {
		if target, err := os.Readlink(fd); err == nil && filepath.Base(target) == name {
			n++
		}
	}
	return n
}

func TestSIGTERMAnswersWhoWaits(t *testing.T) {
	data := filepath.Join(t.TempDir(), "data")
	key := acme(t, data)
	s := serveOn(t, data)
	d := s.door(t, 5, data, key, func(c *device.Config) { c.Faults.Slow = patience })
	answer := make(chan reply, 1)
	go func() {
		a, err := sendTo(s.client, s.api, "POST", openPath(5), key, nil, "Prefer", "wait=30")
		if err != nil {
			t.Error(err)
		}
		answer <- a
	}()
	d.await(device.Commanded)
	begun := time.Now()
	s.signal(syscall.SIGTERM)
	a := s.want(<-answer, http.StatusOK)
	if a.get("command", "outcome") != "pending" || a.get("event", "type") != "LockOpenRequested" {
		t.Errorf("answer %s", a.raw)
	}
	if code := s.exit(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	if took := time.Since(begun); took > 5*time.Second {
		t.Errorf("it took %s to end", took)
	}
	if _, err := sendTo(s.client, s.api, "GET", "/health", creds{}, nil); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("after the end: %v", err)
	}
}
