package api

import (
	"encoding/json"
	"errors"
	"net/http"
	"regexp"
	"strconv"
	"time"

	"github.com/openlock/openlock/internal/access"
	"github.com/openlock/openlock/internal/auth"
	"github.com/openlock/openlock/internal/control"
	"github.com/openlock/openlock/internal/lock"
	"github.com/openlock/openlock/internal/store"
)

// Limits of what a lock holds.
const (
	nameMost = 255 // bytes of a uuid or user id
	wordMost = 800 // bytes of a serial number or vendor name, as in the contract
	keysMost = 500
)

// word is what the contract allows in serial numbers and vendor names.
var word = regexp.MustCompile(`^[a-zA-Z0-9_.,@/:#=[\]-]*$`)

type keyBody struct {
	UUID        opt[string] `json:"uuid"`
	IndexNumber opt[int64]  `json:"indexNumber"`
	UserID      opt[string] `json:"userId"`
}

func (k keyBody) check() error {
	return first(text("uuid of a key", k.UUID, 1, nameMost), text("userId of a key", k.UserID, 0, nameMost))
}

func (k keyBody) key() lock.Key {
	return lock.Key{UUID: k.UUID.V, IndexNumber: number(k.IndexNumber), UserID: k.UserID.V}
}

type createBody struct {
	Index        opt[int64]     `json:"index"`
	UUID         opt[string]    `json:"uuid"`
	SerialNumber opt[string]    `json:"serialNumber"`
	VendorName   opt[string]    `json:"vendorName"` // checked, and in no event of the contract
	OwnerID      opt[string]    `json:"ownerId"`
	Keys         opt[[]keyBody] `json:"keys"`
}

func (in createBody) check(id lock.ID) error {
	if !in.Index.Set || lock.ID(in.Index.V) != id {
		return fail(http.StatusBadRequest, "index is required and must be the lock id in the path, %s", id)
	}
	err := first(
		text("uuid", in.UUID, 1, nameMost), text("ownerId", in.OwnerID, 0, nameMost),
		text("serialNumber", in.SerialNumber, 0, wordMost), text("vendorName", in.VendorName, 0, wordMost),
	)
	switch {
	case err != nil:
		return err
	case !word.MatchString(in.SerialNumber.V) || !word.MatchString(in.VendorName.V):
		return fail(http.StatusBadRequest, "serialNumber and vendorName may hold letters, digits and _.,@/:#=[]- only")
	case len(in.Keys.V) > keysMost:
		return fail(http.StatusBadRequest, "a lock may be created with at most %d keys", keysMost)
	}
	for _, k := range in.Keys.V {
		if err := k.check(); err != nil {
			return err
		}
	}
	return nil
}

func (s *Server) createLock(c *call) error {
	var in createBody
	if err := c.decode(&in); err != nil {
		return err
	}
	if err := in.check(c.id); err != nil {
		return err
	}
	cmd := lock.Create{
		ID: c.id, UUID: in.UUID.V, SerialNumber: in.SerialNumber.V, OwnerID: in.OwnerID.V,
		OrgID: c.by.Org, ThingARN: control.ARNPrefix + c.id.Thing(),
	}
	for _, k := range in.Keys.V {
		cmd.Keys = append(cmd.Keys, k.key())
	}
	if user := c.by.User; user != "" {
		if in.OwnerID.Set && in.OwnerID.V != user {
			return fail(http.StatusForbidden, "a user's lock belongs to that user: leave ownerId out")
		}
		cmd.OwnerID = user
	}
	return s.do(c, cmd)
}

func (s *Server) setOwner(c *call) error {
	var in struct {
		UserID opt[string] `json:"userId"`
	}
	if err := c.decode(&in); err != nil {
		return err
	}
	if err := text("userId", in.UserID, 1, nameMost); err != nil {
		return err
	}
	return s.do(c, lock.SetOwner{UserID: in.UserID.V})
}

func (s *Server) setOrganization(c *call) error {
	var in struct {
		OrgID opt[string] `json:"orgId"`
	}
	if err := c.decode(&in); err != nil {
		return err
	}
	if err := text("orgId", in.OrgID, 1, nameMost); err != nil {
		return err
	}
	if _, err := s.control.Lock(c.r.Context(), c.by, c.id, access.Manage); err != nil {
		return err // before saying whether the organization exists
	}
	_, err := s.db.Organization(c.r.Context(), in.OrgID.V)
	if errors.Is(err, store.ErrNotFound) || in.OrgID.V == auth.OperatorOrg {
		return fail(http.StatusBadRequest, "there is no organization with this orgId")
	}
	if err != nil {
		return err
	}
	return s.do(c, lock.SetOrganization{OrgID: in.OrgID.V})
}

func (s *Server) addKey(c *call) error {
	var in struct {
		KeyUUID        opt[string] `json:"keyUuid"`
		KeyIndexNumber opt[int64]  `json:"keyIndexNumber"`
		UserID         opt[string] `json:"userId"`
	}
	if err := c.decode(&in); err != nil {
		return err
	}
	if err := first(text("keyUuid", in.KeyUUID, 1, nameMost), text("userId", in.UserID, 0, nameMost)); err != nil {
		return err
	}
	return s.do(c, lock.AddKey{Key: lock.Key{UUID: in.KeyUUID.V, IndexNumber: number(in.KeyIndexNumber), UserID: in.UserID.V}})
}

func (s *Server) removeKey(c *call) error {
	var in struct {
		KeyUUID        opt[string] `json:"keyUuid"`
		KeyIndexNumber opt[int64]  `json:"keyIndexNumber"`
	}
	if err := c.decode(&in); err != nil {
		return err
	}
	if err := text("keyUuid", in.KeyUUID, 0, nameMost); err != nil {
		return err
	}
	if in.KeyUUID.V == "" && (in.KeyUUID.Set || !in.KeyIndexNumber.Set) {
		return fail(http.StatusBadRequest, "name the key by keyUuid, keyIndexNumber or both")
	}
	return s.do(c, lock.RemoveKey{UUID: in.KeyUUID.V, IndexNumber: number(in.KeyIndexNumber)})
}

// do runs a command whose input was read.
func (s *Server) do(c *call, cmd lock.Command) error {
	r, err := c.request()
	if err != nil {
		return err
	}
	a, err := s.control.Do(c.r.Context(), r, cmd)
	if err != nil {
		return err
	}
	s.answer(c, a)
	return nil
}

func (s *Server) basicInfo(c *call) error {
	l, err := s.control.Lock(c.r.Context(), c.by, c.id, access.Look)
	if err != nil {
		return err
	}
	c.json(http.StatusOK, struct {
		ID             string  `json:"id"`
		LockID         lock.ID `json:"lockId"`
		UUID           string  `json:"uuid"`
		Version        int64   `json:"version"`
		SerialNumber   string  `json:"serialNumber,omitempty"`
		OwnerID        string  `json:"ownerId,omitempty"`
		OrgID          string  `json:"orgId,omitempty"`
		OrganizationID string  `json:"organizationId,omitempty"`
		R2Prefix       string  `json:"r2Prefix"`
	}{l.ID.String(), l.ID, l.UUID, l.Version, l.SerialNumber, l.OwnerID, l.OrgID, l.OrgID, r2Prefix(l.ID)})
	return nil
}

func (s *Server) details(c *call) error {
	l, err := s.control.Lock(c.r.Context(), c.by, c.id, access.Audit)
	if err != nil {
		return err
	}
	keys := l.Keys
	if keys == nil {
		keys = []lock.Key{}
	}
	c.json(http.StatusOK, struct {
		ID             string     `json:"id"`
		LockID         lock.ID    `json:"lockId"`
		UUID           string     `json:"uuid"`
		SerialNumber   string     `json:"serialNumber,omitempty"`
		Keys           []lock.Key `json:"keys"`
		OwnerID        string     `json:"ownerId,omitempty"`
		OrganizationID string     `json:"organizationId,omitempty"`
		Residents      []any      `json:"residents"`
		OrgID          string     `json:"orgId"`
		Version        int64      `json:"version"`
		Timestamp      string     `json:"timestamp"`
		R2Prefix       string     `json:"r2Prefix"`
	}{
		l.ID.String(), l.ID, l.UUID, l.SerialNumber, keys, l.OwnerID, l.OrgID, []any{}, l.OrgID, l.Version,
		wireTime(time.UnixMilli(l.UpdatedAt)), r2Prefix(l.ID),
	})
	return nil
}

func r2Prefix(id lock.ID) string { return "events/lock/" + id.String() + "/" }

// pageSize is how many events a page holds, as in the contract.
const pageSize = 10

type listedEvent struct {
	AggregateType string          `json:"aggregateType"`
	AggregateID   string          `json:"aggregateId"`
	Version       int64           `json:"version"`
	Type          string          `json:"type"`
	Timestamp     string          `json:"timestamp"`
	OrgID         string          `json:"orgId"`
	Event         json.RawMessage `json:"event"`
	Actor         string          `json:"actor,omitempty"`     // beyond the contract: who did it
	CommandID     string          `json:"commandId,omitempty"` // and the command it belongs to
}

// events pages through what the caller may read: pages from 1, oldest first,
// the last one by default.
func (s *Server) events(c *call) error {
	l, err := s.control.Lock(c.r.Context(), c.by, c.id, access.Audit)
	if err != nil {
		return err
	}
	since := control.Since(c.by, l)
	total := l.Version - since + 1
	pages := (total + pageSize - 1) / pageSize
	page, err := pageOf(c.r, pages)
	if err != nil {
		return err
	}
	listed := []listedEvent{}
	if page <= pages {
		from := since + (page-1)*pageSize
		records, err := s.control.Events(c.r.Context(), c.id, from, int(min(pageSize, l.Version-from+1)))
		if err != nil {
			return err
		}
		for _, r := range records {
			listed = append(listed, listedEvent{
				AggregateType: "Lock", AggregateID: l.ID.String(), Version: r.Version, Type: r.Type,
				Timestamp: wireTime(r.Time), OrgID: r.Org, Event: r.Data, Actor: r.Meta.Actor, CommandID: r.Meta.Command,
			})
		}
	}
	c.json(http.StatusOK, struct {
		AggregateID string        `json:"aggregateId"`
		TotalEvents int64         `json:"totalEvents"`
		Page        int64         `json:"page"`
		PageSize    int           `json:"pageSize"`
		TotalPages  int64         `json:"totalPages"`
		Events      []listedEvent `json:"events"`
	}{l.ID.String(), total, page, pageSize, pages, listed})
	return nil
}

// pageOf reads ?page=; one behind the last is an empty page.
func pageOf(r *http.Request, last int64) (int64, error) {
	given := r.URL.Query().Get("page")
	if given == "" {
		return last, nil
	}
	n, err := strconv.ParseUint(given, 10, 31)
	if err != nil || n == 0 {
		return 0, fail(http.StatusBadRequest, "page must be an integer from 1")
	}
	return int64(n), nil
}
