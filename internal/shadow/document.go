// Package shadow is the AWS IoT Device Shadow. This part of it is pure: a document, the
// requests that change it and the bodies that tell of it, with time as an argument and no
// store, broker or clock. Quoted names in comments are topics of the AWS IoT Core
// Developer Guide; P is the prefix of a shadow's topics.
package shadow

import (
	"bytes"
	"fmt"
	"maps"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

const (
	// MaxDocument is the most bytes that compact desired and compact reported may have
	// together ("AWS IoT Device Shadow service quotas": 8 KB, metadata not counted).
	MaxDocument = 8192

	// MaxPayload is the most bytes of a request that are read at all. AWS names only the
	// document's limit. Four times as much leaves room for the envelope, for nulls and for
	// indentation, and still bounds the work that a stranger can ask for.
	MaxPayload = 4 * MaxDocument

	// MaxDepth is how many levels of objects and arrays a section may hold. AWS says 6 in
	// its error text and 8 on its quota page; the larger, so that no device which works
	// there is refused here. As in the quota page's example, the section itself is not a
	// level.
	MaxDepth = 8

	// MaxClientToken is the longest client token in bytes ("Client tokens in shadow
	// documents").
	MaxClientToken = 64
)

// Section is one half of an update's state, desired or reported: absent (the zero value),
// null, which drops that half of the document, or an object to merge into it.
type Section struct {
	raw jsontext.Value // canonical JSON: nil, null or an object
}

// Update is a validated request to P/update ("Request state document").
type Update struct {
	Desired, Reported Section
	ClientToken       string // "" when absent
	Version           *int64 // nil when the requester did not ask for one
}

// request is what the body of any request may hold ("Request state document").
type request struct {
	State       jsontext.Value `json:"state"`
	ClientToken jsontext.Value `json:"clientToken"`
	Version     jsontext.Value `json:"version"`
}

// ParseUpdate reads the body of P/update. Top-level keys that AWS does not name are
// ignored, since its SDK sends thingName; a null clientToken or version is an absent one.
// It refuses with an *Error, which carries the client token once that is known: JSON with
// duplicate names or invalid UTF-8, a state that is missing or not an object, a section
// that is neither null nor an object, another node beside the sections, an array that
// holds null at any depth, too many levels, too many bytes.
func ParseUpdate(payload []byte) (Update, error) {
	r, token, err := parseRequest(payload)
	if err != nil {
		return Update{}, err
	}
	version, err := parseVersion(r.Version)
	if err != nil {
		return Update{}, err.For(token)
	}
	desired, reported, err := parseState(r.State)
	if err != nil {
		return Update{}, err.For(token)
	}
	return Update{Desired: desired, Reported: reported, ClientToken: token, Version: version}, nil
}

// ParseRequest reads the body of P/get or P/delete: nothing, or an object that may hold a
// clientToken. It refuses with an *Error.
func ParseRequest(payload []byte) (clientToken string, err error) {
	if len(bytes.TrimSpace(payload)) == 0 {
		return "", nil
	}
	_, token, refusal := parseRequest(payload)
	if refusal != nil {
		return "", refusal
	}
	return token, nil
}

func parseRequest(payload []byte) (r request, token string, err *Error) {
	if len(payload) > MaxPayload {
		return r, "", ErrTooLarge
	}
	isObject := jsontext.Value(payload).Kind() == jsontext.KindBeginObject
	if json.Unmarshal(payload, &r) != nil || !isObject {
		return r, "", ErrInvalidJSON
	}
	token, err = parseClientToken(r.ClientToken)
	return r, token, err
}

func parseClientToken(v jsontext.Value) (token string, err *Error) {
	if v == nil {
		return "", nil
	}
	if json.Unmarshal(v, &token) != nil || len(token) > MaxClientToken {
		return "", ErrInvalidClientToken
	}
	return token, nil
}

func parseVersion(v jsontext.Value) (version *int64, err *Error) {
	if v == nil {
		return nil, nil
	}
	if json.Unmarshal(v, &version) != nil || version != nil && *version < 0 {
		return nil, ErrInvalidVersion
	}
	return version, nil
}

func parseState(state jsontext.Value) (desired, reported Section, err *Error) {
	if state == nil {
		return desired, reported, ErrMissingState
	}
	if state.Kind() != jsontext.KindBeginObject {
		return desired, reported, ErrStateNotObject
	}
	nodes := members(state)
	if desired, err = parseSection(nodes["desired"], ErrDesiredNotObject); err != nil {
		return desired, reported, err
	}
	if reported, err = parseSection(nodes["reported"], ErrReportedNotObject); err != nil {
		return desired, reported, err
	}
	delete(nodes, "desired")
	delete(nodes, "reported")
	if len(nodes) > 0 {
		return desired, reported, ErrInvalidNode
	}
	return desired, reported, nil
}

func parseSection(v jsontext.Value, notObject *Error) (Section, *Error) {
	if v == nil {
		return Section{}, nil
	}
	if k := v.Kind(); k != jsontext.KindBeginObject && k != jsontext.KindNull {
		return Section{}, notObject
	}
	// The depth is checked first: nothing after it need fear a deep document.
	if err := checkNodes(v); err != nil {
		return Section{}, err
	}
	return Section{canonical(v)}, nil
}

// checkNodes refuses what no section may hold: more than MaxDepth levels, and null within
// an array ("Array values in shadow documents"). Within an object that an array holds it
// is refused too: arrays are not merged, so there it could not mean deletion.
func checkNodes(section jsontext.Value) *Error {
	dec := jsontext.NewDecoder(bytes.NewReader(section))
	for {
		token, err := dec.ReadToken()
		switch {
		case err != nil: // io.EOF: the section is valid JSON
			return nil
		case dec.StackDepth() > 1+MaxDepth:
			return ErrTooDeep
		case token.Kind() == jsontext.KindNull && withinArray(dec):
			return ErrInvalidNode
		}
	}
}

func withinArray(dec *jsontext.Decoder) bool {
	for i := range dec.StackDepth() {
		if kind, _ := dec.StackIndex(i + 1); kind == jsontext.KindBeginArray {
			return true
		}
	}
	return false
}

// Set is an update by the server itself of one section, "desired" or "reported". A value
// is anything that marshals to JSON; nil deletes its field. It panics on another section
// and on a value that is not JSON-able, which are mistakes of the caller's source.
func Set(section string, fields map[string]any) Update {
	s := Section{canonical(encode(fields))}
	switch section {
	case "desired":
		return Update{Desired: s}
	case "reported":
		return Update{Reported: s}
	}
	panic("shadow: no section " + strconv.Quote(section))
}

// DesiredHas reports whether the request touches this top-level desired key, which null
// as the whole of desired does to every key.
func (u Update) DesiredHas(key string) bool {
	_, ok := u.Desired.member(key)
	return ok
}

// Reports is the compact JSON that the request reports for this top-level key. It is null
// for a key that the request deletes, and so for every key when all of reported is null.
func (u Update) Reports(key string) (raw []byte, ok bool) {
	return u.Reported.member(key)
}

func (s Section) member(key string) (v jsontext.Value, ok bool) {
	if s.raw.Kind() == jsontext.KindNull {
		return s.raw.Clone(), true
	}
	v, ok = members(s.raw)[key]
	return v, ok
}

// Document is one shadow ("Device Shadow service documents"). Its zero value is a shadow
// that never existed. A Document is never modified: Apply and Delete return another.
type Document struct {
	version           int64
	deleted           bool
	desired, reported tree
}

// Version counts the updates, those before a delete included ("Versioning shadow
// documents"; "Interacting with shadows", DELETE).
func (d Document) Version() int64 {
	return d.version
}

// Exists is false before the first update and after a delete.
func (d Document) Exists() bool {
	return d.version > 0 && !d.deleted
}

// Apply merges the update into the document and adds one to its version. It refuses with
// an *Error for the update's client token: ErrVersionConflict if the update asks for
// another version than the document's, ErrTooLarge if the result would exceed MaxDocument,
// and what ParseUpdate refuses in a section, so that Set cannot break a limit either.
func (d Document) Apply(u Update, now time.Time) (Document, error) {
	for _, s := range []Section{u.Desired, u.Reported} {
		if err := checkNodes(s.raw); err != nil {
			return Document{}, err.For(u.ClientToken)
		}
	}
	if u.Version != nil && *u.Version != d.version {
		return Document{}, ErrVersionConflict.For(u.ClientToken)
	}
	next := Document{
		version:  d.version + 1,
		desired:  d.desired.apply(u.Desired, now.Unix()),
		reported: d.reported.apply(u.Reported, now.Unix()),
	}
	state := next.sections(leaf.state)
	if len(state.Desired)+len(state.Reported) > MaxDocument {
		return Document{}, ErrTooLarge.For(u.ClientToken)
	}
	return next, nil
}

// Delete drops the content and keeps the version, which a new shadow of the same name
// continues ("Interacting with shadows", DELETE). AWS forgets it after 48 hours; here it
// is kept, so that no version is ever used twice.
func (d Document) Delete() Document {
	return Document{version: d.version, deleted: d.version > 0}
}

// Desired is the compact JSON of a top-level desired key.
func (d Document) Desired(key string) (raw []byte, ok bool) {
	return d.desired.member(key)
}

// Reported is the compact JSON of a top-level reported key.
func (d Document) Reported(key string) (raw []byte, ok bool) {
	return d.reported.member(key)
}

// Without is the document as a reader may see it who must not see this top-level desired
// key, in state, delta or metadata. Its version is the document's.
func (d Document) Without(desiredKey string) Document {
	d.desired = maps.Clone(d.desired)
	delete(d.desired, desiredKey)
	if len(d.desired) == 0 {
		d.desired = nil
	}
	return d
}

// sections are the halves of a document or a request on the wire; nil is absent.
type sections struct {
	Desired  jsontext.Value `json:"desired,omitzero"`
	Reported jsontext.Value `json:"reported,omitzero"`
	Delta    jsontext.Value `json:"delta,omitzero"`
}

// reply is a response state document ("Response state documents").
type reply struct {
	State       any    `json:"state,omitzero"`
	Metadata    any    `json:"metadata,omitzero"`
	Version     int64  `json:"version"`
	Timestamp   int64  `json:"timestamp"`
	ClientToken string `json:"clientToken,omitzero"`
}

// GetAccepted is the body for P/get/accepted: the whole state, and its delta if any. Only
// a document that Exists has one.
func (d Document) GetAccepted(clientToken string, now time.Time) []byte {
	state := d.sections(leaf.state)
	state.Delta = difference(d.desired, d.reported).encode(leaf.state)
	return encode(reply{state, d.sections(leaf.metadata), d.version, now.Unix(), clientToken})
}

// UpdateAccepted is the body for P/update/accepted: the fields of the request and no
// others, nulls included, with their metadata. Time and document are those of the Apply.
func UpdateAccepted(u Update, after Document, now time.Time) []byte {
	state := sections{Desired: u.Desired.raw, Reported: u.Reported.raw}
	metadata := sections{Desired: stamp(u.Desired.raw, now.Unix()), Reported: stamp(u.Reported.raw, now.Unix())}
	return encode(reply{state, metadata, after.version, now.Unix(), u.ClientToken})
}

// Delta is the body for P/update/delta ("Delta state"): what desired holds and reported
// does not, with desired's metadata. It is not ok when there is no difference, and then
// nothing is published.
func (d Document) Delta(clientToken string, now time.Time) (body []byte, ok bool) {
	delta := difference(d.desired, d.reported)
	if delta == nil {
		return nil, false
	}
	return encode(reply{delta.encode(leaf.state), delta.encode(leaf.metadata), d.version, now.Unix(), clientToken}), true
}

// DeleteAccepted is the body for P/delete/accepted, of the document before or after the
// delete: they have one version.
func DeleteAccepted(d Document, clientToken string, now time.Time) []byte {
	return encode(reply{Version: d.version, Timestamp: now.Unix(), ClientToken: clientToken})
}

// Documents is the body for P/update/documents ("/documents response state document"). A
// shadow that the update created has no previous.
func Documents(before, after Document, clientToken string, now time.Time) []byte {
	return encode(struct {
		Previous    *snapshot `json:"previous,omitzero"`
		Current     *snapshot `json:"current"`
		Timestamp   int64     `json:"timestamp"`
		ClientToken string    `json:"clientToken,omitzero"`
	}{before.snapshot(), after.snapshot(), now.Unix(), clientToken})
}

type snapshot struct {
	State    sections `json:"state"`
	Metadata sections `json:"metadata"`
	Version  int64    `json:"version"`
}

func (d Document) snapshot() *snapshot {
	if !d.Exists() {
		return nil
	}
	return &snapshot{d.sections(leaf.state), d.sections(leaf.metadata), d.version}
}

func (d Document) sections(of func(leaf) jsontext.Value) sections {
	return sections{Desired: d.desired.encode(of), Reported: d.reported.encode(of)}
}

// durable is a document as it is stored. Its metadata has one number for each leaf, an
// array being one leaf.
type durable struct {
	Version  int64    `json:"version"`
	Deleted  bool     `json:"deleted,omitzero"`
	State    sections `json:"state"`
	Metadata sections `json:"metadata"`
}

// Encode is the durable form: one JSON object, for DecodeDocument and for nobody else.
func (d Document) Encode() []byte {
	return encode(durable{d.version, d.deleted, d.sections(leaf.state), d.sections(leaf.time)})
}

// DecodeDocument is the inverse of Encode.
func DecodeDocument(b []byte) (Document, error) {
	var stored durable
	if err := json.Unmarshal(b, &stored); err != nil {
		return Document{}, fmt.Errorf("shadow: decode document: %w", err)
	}
	desired, err := decodeTree(stored.State.Desired, stored.Metadata.Desired)
	if err != nil {
		return Document{}, fmt.Errorf("shadow: decode desired: %w", err)
	}
	reported, err := decodeTree(stored.State.Reported, stored.Metadata.Reported)
	if err != nil {
		return Document{}, fmt.Errorf("shadow: decode reported: %w", err)
	}
	return Document{stored.Version, stored.Deleted, desired, reported}, nil
}

func decodeTree(state, times jsontext.Value) (tree, error) {
	if state == nil {
		return nil, nil
	}
	var values, ats map[string]jsontext.Value
	if err := json.Unmarshal(state, &values); err != nil {
		return nil, err
	}
	if err := json.Unmarshal(times, &ats); err != nil {
		return nil, err
	}
	t := make(tree, len(values))
	for name, v := range values {
		node, err := decodeNode(v, ats[name])
		if err != nil {
			return nil, fmt.Errorf("%q: %w", name, err)
		}
		t[name] = node
	}
	return t, nil
}

func decodeNode(v, time jsontext.Value) (any, error) {
	if v.Kind() == jsontext.KindBeginObject {
		return decodeTree(v, time)
	}
	// Canonical again, in case a store has a notation of its own.
	l := leaf{value: canonical(v)}
	return l, json.Unmarshal(time, &l.at)
}

// tree is an object of a document; each value is a tree or a leaf. No tree is empty: an
// object that holds nothing is not there, whether it was sent empty or an update emptied
// it, just as a section that becomes empty disappears ("Empty shadow document
// properties"). So every node of a document has a time, and a delta has only leaves.
type tree map[string]any

// leaf is a value that is replaced as a whole, a scalar or an array, and when it was.
type leaf struct {
	value jsontext.Value // canonical JSON
	at    int64          // epoch seconds
}

func (l leaf) state() jsontext.Value    { return l.value }
func (l leaf) metadata() jsontext.Value { return stamp(l.value, l.at) }
func (l leaf) time() jsontext.Value     { return strconv.AppendInt(nil, l.at, 10) }

func (t tree) apply(s Section, at int64) tree {
	switch s.raw.Kind() {
	case jsontext.KindBeginObject:
		return t.merge(s.raw, at)
	case jsontext.KindNull:
		return nil
	}
	return t
}

// merge is deep: objects merge, null deletes, all else replaces ("Updating a shadow").
// A field that is sent gets a new time, even if its value is the same.
func (t tree) merge(patch jsontext.Value, at int64) tree {
	merged := make(tree, len(t))
	maps.Copy(merged, t)
	for name, v := range members(patch) {
		switch v.Kind() {
		case jsontext.KindNull:
			delete(merged, name)
		case jsontext.KindBeginObject:
			below, _ := t[name].(tree)
			if below = below.merge(v, at); below == nil {
				delete(merged, name)
			} else {
				merged[name] = below
			}
		default:
			merged[name] = leaf{v, at}
		}
	}
	if len(merged) == 0 {
		return nil
	}
	return merged
}

// difference is every leaf of desired that reported lacks or has otherwise ("Delta
// state"). What only reported holds is no difference.
func difference(desired, reported tree) tree {
	delta := tree{}
	for name, node := range desired {
		switch want := node.(type) {
		case tree:
			have, _ := reported[name].(tree)
			if d := difference(want, have); d != nil {
				delta[name] = d
			}
		case leaf:
			have, ok := reported[name].(leaf)
			if !ok || !equal(want.value, have.value) {
				delta[name] = want
			}
		}
	}
	if len(delta) == 0 {
		return nil
	}
	return delta
}

func (t tree) member(key string) (raw []byte, ok bool) {
	switch node := t[key].(type) {
	case tree:
		return node.encode(leaf.state), true
	case leaf:
		return node.value.Clone(), true
	}
	return nil, false
}

// encode writes the tree with each leaf as of says, and nil for nil.
func (t tree) encode(of func(leaf) jsontext.Value) jsontext.Value {
	if t == nil {
		return nil
	}
	object := make(map[string]jsontext.Value, len(t))
	for name, node := range t {
		switch node := node.(type) {
		case tree:
			object[name] = node.encode(of)
		case leaf:
			object[name] = of(node)
		}
	}
	return encode(object)
}

// stamp is the metadata of a value that came at one time: the same JSON with the time in
// place of each scalar, array elements and nulls of a request included.
func stamp(v jsontext.Value, at int64) jsontext.Value {
	if v == nil {
		return nil
	}
	mark := jsontext.Value(fmt.Sprintf(`{"timestamp":%d}`, at))
	var out bytes.Buffer
	enc := jsontext.NewEncoder(&out)
	dec := jsontext.NewDecoder(bytes.NewReader(v))
	for {
		token, err := dec.ReadToken()
		if err != nil { // io.EOF: v is valid JSON
			return bytes.TrimSpace(out.Bytes())
		}
		if isScalar(dec, token.Kind()) {
			err = enc.WriteValue(mark)
		} else {
			err = enc.WriteToken(token)
		}
		must(err)
	}
}

// isScalar tells the scalar that was just read from a bracket and from an object's name.
func isScalar(dec *jsontext.Decoder, kind jsontext.Kind) bool {
	switch kind {
	case jsontext.KindBeginObject, jsontext.KindEndObject, jsontext.KindBeginArray, jsontext.KindEndArray:
		return false
	}
	// Names and values alternate, so that after a name their number is odd.
	parent, length := dec.StackIndex(dec.StackDepth())
	return parent != jsontext.KindBeginObject || length%2 == 0
}

// equal compares two canonical values, numbers by what they amount to: a device that
// reports 1.0 has done what 1 desired. The comparison is exact, with no limit to size or
// precision, since a number may be an identity.
func equal(a, b jsontext.Value) bool {
	if bytes.Equal(a, b) {
		return true
	}
	x, y := jsontext.NewDecoder(bytes.NewReader(a)), jsontext.NewDecoder(bytes.NewReader(b))
	for {
		s, errX := x.ReadToken()
		t, errY := y.ReadToken()
		if errX != nil || errY != nil {
			return errX != nil && errY != nil // io.EOF: both are valid JSON
		}
		if !sameToken(s, t) {
			return false
		}
	}
}

func sameToken(s, t jsontext.Token) bool {
	if s.Kind() == jsontext.KindNumber && t.Kind() == jsontext.KindNumber {
		return decimal(s.String()) == decimal(t.String())
	}
	return s.Kind() == t.Kind() && s.String() == t.String()
}

// decimal spells equal JSON numbers equally: 1, 1.0 and 10e-1 are all "1e0". A number
// whose exponent no clock, counter or sensor needs keeps its own spelling.
func decimal(number string) string {
	mantissa, exponent, scientific := strings.Cut(strings.ToLower(number), "e")
	if !scientific {
		exponent = "0"
	}
	power, err := strconv.ParseInt(exponent, 10, 32)
	if err != nil {
		return number
	}
	mantissa, negative := strings.CutPrefix(mantissa, "-")
	whole, fraction, _ := strings.Cut(mantissa, ".")
	digits := strings.TrimRight(whole+fraction, "0")
	power += int64(len(whole) - len(digits))
	digits = strings.TrimLeft(digits, "0")
	switch {
	case digits == "":
		return "0"
	case negative:
		digits = "-" + digits
	}
	return digits + "e" + strconv.FormatInt(power, 10)
}

// canonical is v, which is valid JSON, without spaces, with sorted names and each string
// in its shortest form. Numbers stay exactly as they were sent.
func canonical(v jsontext.Value) jsontext.Value {
	v = v.Clone()
	must(v.Canonicalize(jsontext.CanonicalizeRawInts(false), jsontext.CanonicalizeRawFloats(false)))
	return v
}

// members are the members of a valid object, and none of null or of nothing.
func members(object jsontext.Value) (m map[string]jsontext.Value) {
	if object != nil {
		must(json.Unmarshal(object, &m))
	}
	return m
}

// encode is compact JSON with sorted names. What is not UTF-8, such as a name in the URL
// of a request, becomes U+FFFD.
func encode(v any) jsontext.Value {
	b, err := json.Marshal(v, json.Deterministic(true), jsontext.AllowInvalidUTF8(true))
	must(err)
	return b
}

// must is for what cannot fail on JSON that was validated when it came in.
func must(err error) {
	if err != nil {
		panic("shadow: " + err.Error())
	}
}
